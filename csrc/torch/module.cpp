// freedave_kernels._C: what was built, what of it this machine can run, and what its ops know.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/isa.h"
#include "freedave/draft_step.h"
#include "freedave/limits.h"
#include "freedave/logit_floor.h"
#include "freedave/names.h"
#include "freedave/pooled_step.h"
#include "freedave/predict_tokens.h"
#include "freedave/select_transfer.h"
#include "git_state.h"
#include "torch/schemas.h"

namespace {

using freedave::cpu::Isa;

template <typename Predicate>
std::vector<std::string> isas_where(Predicate predicate) {
  std::vector<std::string> names;
  for (const Isa isa : freedave::cpu::kIsas) {
    if (predicate(isa)) names.emplace_back(freedave::cpu::name(isa));
  }
  return names;
}

pybind11::dict build() {
  pybind11::dict build;
  build["version"] = FREEDAVE_VERSION;
  build["git_commit"] = kGitCommit;
  build["git_dirty"] = kGitDirty;
  build["compiler"] = FREEDAVE_COMPILER;
  build["build_type"] = FREEDAVE_BUILD_TYPE;
  build["sanitize"] = FREEDAVE_SANITIZE;
  build["cuda"] = static_cast<bool>(FREEDAVE_HAS_CUDA);
  build["cuda_architectures"] = pybind11::str(FREEDAVE_HAS_CUDA ? FREEDAVE_CUDA_ARCHS : "").attr("split")();
  build["cpu_isas"] = isas_where(freedave::cpu::is_compiled);
  return build;
}

template <typename Enum>
std::vector<std::string> names() {
  std::vector<std::string> names;
  for (int32_t value = 0; value < freedave::count_of<Enum>(); ++value) {
    names.emplace_back(name(static_cast<Enum>(value)));
  }
  return names;
}

std::vector<std::string> ops() {
  std::vector<std::string> names;
  for (const std::string schema : freedave::kSchemas) names.push_back(schema.substr(0, schema.find('(')));
  return names;
}

// What the native library and Python both have to know. Python compares it with its own when it is imported.
pybind11::dict contract() {
  pybind11::dict contract;
  contract["ops"] = ops();
  contract["measures"] = names<freedave::Measure>();
  contract["suppressions"] = names<freedave::Suppress>();
  contract["rules"] = names<freedave::Rule>();
  contract["orders"] = names<freedave::Order>();
  contract["matches"] = names<freedave::Match>();
  contract["draftings"] = names<freedave::Drafting>();
  contract["pooled_draftings"] = names<freedave::PooledDrafting>();
  contract["fallbacks"] = names<freedave::Fallback>();
  contract["counters"] = names<freedave::Counter>();
  contract["max_length"] = freedave::kMaxLength;
  contract["max_drafts"] = freedave::kMaxDrafts;
  contract["max_pool_states"] = freedave::kMaxPoolStates;
  contract["state_fields"] = freedave::kStateFields;
  contract["largest_log_odds"] = freedave::kLargestLogOdds;
  contract["most_summed_tokens"] = freedave::kMostSummedTokens;
  contract["tokens_per_state"] = freedave::kTokensPerState;
  return contract;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What was built: see build, contract, usable_cpu_isas() and cpu_isa().";
  m.attr("build") = build();
  m.attr("contract") = contract();
  m.def(
      "usable_cpu_isas", [] { return isas_where(freedave::cpu::is_usable); },
      "The compiled instruction sets that this machine can run, slowest first.");
  m.def(
      "cpu_isa", [] { return freedave::cpu::name(freedave::cpu::chosen_isa()); },
      "The instruction set that the CPU kernels use: the best usable one, or what FREEDAVE_CPU_ISA names.");
}

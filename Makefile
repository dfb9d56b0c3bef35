# make setup   creates .venv, installs the pins and builds the native code (cheap when nothing changed)
# make demo    decodes held-out problems with the embedded model, statically and with FreeDave
# make test    every test; test-asan runs the op contract tests against an ASan+UBSan build
# make simt    builds what executes the CUDA kernels on the CPU (part of make test); test-simt-asan and test-simt-tsan run
#              the contract tests on it with sanitizers, coverage-cuda writes which lines of the kernels tests execute
# make lint    ruff, clang-format, mypy
# make bench   every benchmark that needs no GPU; results, plots and the tables of docs/benchmarks.md (a quarter of an hour)
# make wheel   a wheel in dist/; check-cuda-torch tries it in a CPU and in a CUDA torch, without a GPU
# make check-torch  the wheel and a source build in the oldest torch, with the oldest libraries that pyproject.toml allows
# make check-engines  our algorithms for SGLang beside SGLang's own, from its wheel, without a GPU
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CUDA_VENV := .venv-cuda
OLDEST_VENV := .venv-oldest
TORCHAO := build/torchao
ENGINES_VENV := .venv-engines
PINS := requirements/build.txt requirements/decode.txt requirements/dev.txt requirements/triton.txt
NATIVE := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cmake -type f)
CXX_FILES = $(shell find csrc tests/simt \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \))
OP_TESTS = tests/test_predict_tokens.py tests/test_scored_tokens.py tests/test_partial_predictions.py tests/test_drawn_tokens.py tests/test_draw_bounds.py tests/test_logit_floor.py tests/test_rank_positions.py \
           tests/test_select_transfer.py tests/test_build_drafts.py tests/test_verify_drafts.py tests/test_draft_step.py tests/test_pooled_step.py tests/test_keep.py tests/test_long_windows.py

# What every CMake build beside the installed one begins with.
CMAKE_HERE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
             -DPython_EXECUTABLE=$(abspath $(BIN))/python -DFREEDAVE_CUDA=off

.PHONY: setup demo test test-asan simt test-simt-asan test-simt-tsan coverage-cuda lint bench wheel check-cuda-torch check-torch check-engines clean
.DELETE_ON_ERROR:

setup: $(VENV)/.built

$(VENV)/.installed: $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make setup PYTHON=python3.x")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; Debian/Ubuntu: apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet -r requirements/build.txt -r requirements/decode.txt -r requirements/dev.txt
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/python -m pip install --quiet -r requirements/triton.txt
	@touch $@

# Fifty packages and most of a minute, so only where they are used.
$(VENV)/.lm-eval: requirements/lm-eval.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r $<
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/freedave demo

$(TORCHAO)/.installed: requirements/torchao.txt $(VENV)/.installed
	rm -rf $(TORCHAO)
	$(BIN)/python -m pip install --quiet --no-deps --target $(TORCHAO) -r $<
	@touch $@

# A test takes one thread; processes share the tests out.
test: setup simt $(VENV)/.lm-eval $(TORCHAO)/.installed
	$(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal
	PYTHONPATH=$(abspath $(TORCHAO)) $(BIN)/python -m pytest -q --disable-warnings tests/test_torchao.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# The interpreter is not instrumented, so the sanitizer runtimes are loaded ahead of it. Every allocation goes through malloc
# (PYTHONMALLOC), and leak checking is off: the interpreter and torch keep memory until exit.
ASAN_RUN = LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc

# Released memory is kept from reuse for a while, so the test that memory does not grow is left out.
test-asan: setup
	$(CMAKE_HERE) -B build/asan -DFREEDAVE_SANITIZE=address,undefined -DFREEDAVE_WERROR=ON
	$(BIN)/cmake --build build/asan --target freedave_ops
	$(ASAN_RUN) FREEDAVE_LIBRARY=$(abspath build/asan/libfreedave_ops.so) \
	  $(BIN)/python -m pytest -q $(OP_TESTS) tests/test_dispatcher.py -k 'not triton and not cuda_emulated and not given_back'

simt: setup
	$(CMAKE_HERE) -B build/simt -DFREEDAVE_SIMT=ON > build/simt.log || { cat build/simt.log; exit 1; }
	$(BIN)/cmake --build build/simt --target simt_all

test-simt-asan: setup
	$(CMAKE_HERE) -B build/simt-asan -DFREEDAVE_SIMT=ON -DFREEDAVE_SANITIZE=address,undefined -DFREEDAVE_WERROR=ON
	$(BIN)/cmake --build build/simt-asan --target simt_all
	build/simt-asan/simt_selftest $$(build/simt-asan/simt_selftest)
	$(ASAN_RUN) FREEDAVE_EMULATED_LIBRARY=$(abspath build/simt-asan/libfreedave_ops_emulated.so) \
	  $(BIN)/python -m pytest -q $(OP_TESTS) -k cuda_emulated

# ThreadSanitizer wants addresses where it expects them (setarch -R), and takes a thousand times as long: the examples,
# the recorded cases and windows of a few warps, in every order of threads.
TSAN_RUN = TSAN_OPTIONS=halt_on_error=1:report_thread_leaks=0:ignore_noninstrumented_modules=1 setarch $$(uname -m) -R

test-simt-tsan: setup
	$(CMAKE_HERE) -B build/simt-tsan -DFREEDAVE_SIMT=ON -DFREEDAVE_SANITIZE=thread -DFREEDAVE_WERROR=ON
	$(BIN)/cmake --build build/simt-tsan --target simt_all
	$(TSAN_RUN) build/simt-tsan/simt_selftest $$(build/simt-tsan/simt_selftest)
	$(TSAN_RUN) env LD_PRELOAD="$$(c++ -print-file-name=libtsan.so)" OMP_NUM_THREADS=1 \
	  FREEDAVE_EMULATED_LIBRARY=$(abspath build/simt-tsan/libfreedave_ops_emulated.so) \
	  $(BIN)/python -m pytest -q $(OP_TESTS) -k 'cuda_emulated and (example or golden or long_windows) and not 1024'

coverage-cuda: setup
	$(CMAKE_HERE) -B build/simt-coverage -DFREEDAVE_SIMT=ON -DFREEDAVE_COVERAGE=ON
	$(BIN)/cmake --build build/simt-coverage --target freedave_ops_emulated
	find build/simt-coverage -name '*.gcda' -delete
	FREEDAVE_EMULATED_LIBRARY=$(abspath build/simt-coverage/libfreedave_ops_emulated.so) \
	  $(BIN)/python -m pytest -q $(OP_TESTS) -k cuda_emulated
	$(BIN)/python tests/simt/kernel_coverage.py build/simt-coverage docs/cuda-coverage.md

# A wheel goes to other machines: their GPUs are not those that are here.
wheel: setup
	rm -f dist/*.whl
	FREEDAVE_CUDA_ARCHS=$${FREEDAVE_CUDA_ARCHS:-all} $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The contract tests of the ops under another torch, where a build of this package lies in a folder: those of the backends that run
# anywhere, and what torch.compile and opcheck say. (`python -m pytest` would import the package that stands here.)
OPS_UNDER = PYTHONPATH=$(abspath $(2)) OMP_NUM_THREADS=1 FREEDAVE_EMULATED_LIBRARY= $(1)/bin/pytest -q \
            $(OP_TESTS) tests/test_dispatcher.py -k 'cpu or reference or dispatcher or opcheck or compile'

# The library is built against a CPU torch; it must load in a CUDA torch, with its CUDA kernels, and build there as well.
# A separate environment with 5.5 GB of CUDA torch, in .venv-cuda. Needs nvcc, but no GPU.
CHECK := build/check
check-cuda-torch: wheel $(CUDA_VENV)/.installed
	rm -rf $(CHECK) && mkdir -p $(CHECK)
	$(BIN)/python -m pip install --quiet --no-deps --target $(CHECK)/wheel dist/*.whl
	$(BIN)/python tests/check_torch.py $(CHECK)/wheel
	$(CUDA_VENV)/bin/python tests/check_torch.py $(CHECK)/wheel cuda
	FREEDAVE_CUDA=on FREEDAVE_BUILD_FOLDER=$(abspath $(CHECK)/cmake) \
	  $(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --target $(CHECK)/source .
	$(CUDA_VENV)/bin/python tests/check_torch.py $(CHECK)/source cuda
	$(call OPS_UNDER,$(CUDA_VENV),$(CHECK)/source)

$(CUDA_VENV)/.installed: requirements/cuda-torch.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet -r $<
	@touch $@

# Tests of the ops in both, the decoder's in the source build. Where nvcc is, one architecture shows that the host code compiles.
OLDEST := build/oldest
DECODER_TESTS = tests/test_decoding.py tests/test_checkpoint.py tests/test_packed_forward.py tests/test_published_checkpoints.py \
                tests/test_tokenizers.py tests/test_convert.py tests/test_custom_generate.py tests/test_streaming.py tests/test_cli.py \
                tests/test_command_line.py
check-torch: wheel $(OLDEST_VENV)/.installed
	rm -rf $(OLDEST) && mkdir -p $(OLDEST)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --no-deps --target $(OLDEST)/wheel dist/*.whl
	$(OLDEST_VENV)/bin/python tests/check_torch.py $(OLDEST)/wheel
	$(call OPS_UNDER,$(OLDEST_VENV),$(OLDEST)/wheel)
	FREEDAVE_CUDA_ARCHS=90 FREEDAVE_BUILD_FOLDER=$(abspath $(OLDEST)/cmake) \
	  $(OLDEST_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --target $(OLDEST)/source .
	$(OLDEST_VENV)/bin/python tests/check_torch.py $(OLDEST)/source
	$(call OPS_UNDER,$(OLDEST_VENV),$(OLDEST)/source)
	PYTHONPATH=$(abspath $(OLDEST))/source OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/pytest -q $(DECODER_TESTS) -k 'not triton and not cuda_emulated'

$(OLDEST_VENV)/.installed: requirements/oldest.txt
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet -r $<
	@touch $@

# SGLang's wheel without what it needs on a GPU: requirements/engines.txt lists what its Python code imports. Ours is installed
# as well, because SGLang finds plug-ins by their entry points.
check-engines: $(ENGINES_VENV)/.installed
	FREEDAVE_CUDA=off FREEDAVE_BUILD_FOLDER=$(abspath build/engines) \
	  $(ENGINES_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps --force-reinstall .
	PYTHONPATH=$(abspath tests/engines/stand_ins) OMP_NUM_THREADS=1 $(ENGINES_VENV)/bin/pytest -q --disable-warnings tests/engines/check_sglang.py

$(ENGINES_VENV)/.installed: requirements/engines.txt
	$(PYTHON) -m venv $(ENGINES_VENV)
	$(ENGINES_VENV)/bin/python -m pip install --quiet -r $<
	$(ENGINES_VENV)/bin/python -m pip install --quiet --no-deps sglang==0.5.23 xgrammar==0.2.7
	@touch $@

bench: setup
	$(BIN)/python -m benchmarks all

clean:
	rm -rf build dist *.egg-info freedave_kernels/*.so $(VENV)/.built .pytest_cache .mypy_cache .ruff_cache .hypothesis

#include "kernel_name.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

namespace simt {
namespace {

template <typename T>
std::vector<T> read(std::ifstream& file, ElfW(Off) offset, std::size_t bytes) {
  std::vector<T> items(bytes / sizeof(T));
  file.seekg(static_cast<std::streamoff>(offset));
  file.read(reinterpret_cast<char*>(items.data()), static_cast<std::streamsize>(items.size() * sizeof(T)));
  return items;
}

// The symbol whose value is `value` in the symbol table of the ELF file at `path`; empty when there is none.
std::string symbol_at(const char* path, ElfW(Addr) value) {
  std::ifstream file(path, std::ios::binary);
  const auto header = read<ElfW(Ehdr)>(file, 0, sizeof(ElfW(Ehdr)));
  if (!file) return {};
  const auto sections = read<ElfW(Shdr)>(file, header[0].e_shoff, header[0].e_shnum * sizeof(ElfW(Shdr)));
  for (const auto& section : sections) {
    if (section.sh_type != SHT_SYMTAB) continue;
    const auto& names = sections[section.sh_link];
    for (const auto& symbol : read<ElfW(Sym)>(file, section.sh_offset, section.sh_size)) {
      if (symbol.st_value != value || (symbol.st_info & 0xf) != STT_FUNC) continue;
      return read<char>(file, names.sh_offset, names.sh_size).data() + symbol.st_name;
    }
  }
  return {};
}

}  // namespace

std::string kernel_name(const void* address) {
  Dl_info info;
  void* map = nullptr;
  if (dladdr1(address, &info, &map, RTLD_DL_LINKMAP) != 0) {
    const ElfW(Addr) base = static_cast<const link_map*>(map)->l_addr;
    const std::string symbol = symbol_at(info.dli_fname, reinterpret_cast<ElfW(Addr)>(address) - base);
    if (char* name = abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, nullptr)) {
      std::string demangled = name;
      std::free(name);
      return demangled;
    }
    if (!symbol.empty()) return symbol;
  }
  char text[64];
  std::snprintf(text, sizeof(text), "kernel at %p", address);
  return text;
}

}  // namespace simt

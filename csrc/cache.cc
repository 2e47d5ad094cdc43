#include "csrc/cache.h"

#include <cstdio>
#include <cstdlib>

namespace jml {

// FNV-1a of 128 bits.
std::string digest(const std::string& text) {
  using U128 = unsigned __int128;
  const U128 prime = (U128(1) << 88) + 0x13B;
  U128 h = (U128(0x6C62272E07BB0142) << 64) + 0x62B821756295C58D;
  for (unsigned char c : text) h = (h ^ c) * prime;
  char out[33];
  std::snprintf(out, sizeof out, "%016llx%016llx", static_cast<unsigned long long>(h >> 64),
                static_cast<unsigned long long>(h));
  return out;
}

std::string cache_folder() {
  const char* own = std::getenv("JAXMETAL_CACHE_DIR");
  if (own != nullptr && *own) return own;
  const char* xdg = std::getenv("XDG_CACHE_HOME");
  if (xdg != nullptr && *xdg) return std::string(xdg) + "/jaxmetal_linalg";
  const char* home = std::getenv("HOME");
  return home != nullptr && *home ? std::string(home) + "/.cache/jaxmetal_linalg" : "";
}

}  // namespace jml

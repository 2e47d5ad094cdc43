// Where compiled kernels are kept between processes, and under which names.
#pragma once

#include <string>

namespace jml {

// 32 hexadecimal digits.
std::string digest(const std::string& text);

// JAXMETAL_CACHE_DIR, else the user's cache folder; empty where there is none.
std::string cache_folder();

}  // namespace jml

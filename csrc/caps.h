// The table of GPUs that plans are made for; sources are in caps.cc.
#pragma once

#include <string>
#include <vector>

#include "csrc/device.h"

namespace jml {

const std::vector<Caps>& all_caps();

// nullptr if there is no such name.
const Caps* find_caps(const std::string& name);

// The row for a GPU by the name that its driver gives, e.g. "NVIDIA H200".
const Caps& caps_of_cuda_gpu(const std::string& product);

// "apple-m1, apple-m1-pro, ...", for messages.
std::string caps_names();

// A list of objects, one a row.
std::string caps_json();

}  // namespace jml

// The CPU engine: one parallel region that measures the gradients' norm, decides, and steps every tensor.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

void run(Job& job);

}  // namespace fusedopt::cpu

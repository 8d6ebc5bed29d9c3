// Everything of the standard library that the kernels use; see isa.h for why it is included first.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "memory.h"

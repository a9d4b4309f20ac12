#pragma once

// Everything a LibTorch program uses.
#include "torchqat/ops/staircase_relu.h"

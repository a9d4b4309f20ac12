#pragma once

// Marks the functions of math/ for both compilers: nvcc sees a device function, g++ a plain one.
#ifdef __CUDACC__
#define TORCHQAT_HD __host__ __device__
#else
#define TORCHQAT_HD
#endif

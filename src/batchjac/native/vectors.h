/* Vectors of LANES numbers, and what the kernels share.
 *
 * Plain C for any compiler that knows GCC's vector types. It is compiled once for each set of
 * vector instructions, with LANES the numbers that one register holds; `__init__.py` loads what
 * fits the machine. Threads are OpenMP's, of the library that torch has loaded.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define UNROLL _Pragma("GCC unroll 16")

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t lanes __attribute__((vector_size(LANES * 4)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

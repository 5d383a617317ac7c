#include "vectors.h"

/* Another number whenever an argument of any kernel gets another meaning. */
int batchjac_version(void) { return 3; }

/* Products of many matrices.
 *
 *   y[n,i,j] = sum_k a[n,i,k] b[n,k,j]    a and b with any strides but 1 along j, y whole
 *
 * R rows of y and V vectors of its columns stay in registers while all k are added. (Writing
 * y past the caches was tried: no faster, and slower where k is small.)
 */
typedef struct {
  int64_t n, i, k, j;
  int64_t an, ai, ak, bn, bk;
  int64_t yn, yi;
} Product;

#define STRIP(R, V)                                                                                \
  static inline void strip_##R##_##V(const float *a, const float *b, float *y, const Product *z,   \
                                     int rows) {                                                   \
    vec sum[R][V];                                                                                 \
    int64_t at[R]; /* where there are fewer rows the first stands in */                            \
    UNROLL for (int r = 0; r < R; r++) at[r] = r < rows ? r * z->ai : 0;                           \
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) sum[r][v] = (vec){0};    \
    for (int64_t k = 0; k < z->k; k++, b += z->bk, a += z->ak) {                                   \
      vec x[V];                                                                                    \
      UNROLL for (int v = 0; v < V; v++) x[v] = *(const vec *)(b + v * LANES);                     \
      UNROLL for (int r = 0; r < R; r++)                                                           \
        UNROLL for (int v = 0; v < V; v++) sum[r][v] += a[at[r]] * x[v];                           \
    }                                                                                              \
    UNROLL for (int r = 0; r < R; r++)                                                             \
      if (r < rows)                                                                                \
        UNROLL for (int v = 0; v < V; v++) *(vec *)(y + r * z->yi + v * LANES) = sum[r][v];        \
  }                                                                                                \
  /* R rows of y, V vectors at a time; the last are moved back, over some done before. */        \
  static void rows_##R##_##V(const float *a, const float *b, float *y, const Product *z,          \
                             int rows) {                                                           \
    int64_t j = 0;                                                                                 \
    for (; j + V * LANES <= z->j; j += V * LANES) strip_##R##_##V(a, b + j, y + j, z, rows);       \
    j = z->j - V * LANES;                                                                          \
    if (z->j % (V * LANES)) strip_##R##_##V(a, b + j, y + j, z, rows);                             \
  }

#if LANES == 8
STRIP(8, 1) STRIP(4, 2)
#define ROWS(vecs) ((vecs) == 1 ? 8 : 4)
#define STRIPS(vecs) ((vecs) == 1 ? rows_8_1 : rows_4_2)
#define VECS 2
#else
STRIP(14, 1) STRIP(10, 2) STRIP(8, 3) STRIP(6, 4)
#define ROWS(vecs) ((vecs) == 1 ? 14 : (vecs) == 2 ? 10 : (vecs) == 3 ? 8 : 6)
#define STRIPS(vecs)                                                                               \
  ((vecs) == 1 ? rows_14_1 : (vecs) == 2 ? rows_10_2 : (vecs) == 3 ? rows_8_3 : rows_6_4)
#define VECS 4
#endif

/* y has at least one vector of columns. */
void batchjac_product(const float *a, const float *b, float *y, const Product *z, int threads) {
  const int vecs = z->j / LANES < VECS ? (int)(z->j / LANES) : VECS, many = ROWS(vecs);
  const int64_t blocks = (z->i + many - 1) / many;
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
  for (int64_t n = 0; n < z->n; n++)
    for (int64_t m = 0; m < blocks; m++) {
      const int64_t first = m * many;
      const int rows = z->i - first < many ? (int)(z->i - first) : many;
      STRIPS(vecs)
      (a + n * z->an + first * z->ai, b + n * z->bn, y + n * z->yn + first * z->yi, z, rows);
    }
}

/* Convolutions toward their inputs, and products of thin matrices, for float32 on CPUs.
 *
 * Plain C for any compiler that knows GCC's vector types. It is compiled once for each set of vector
 * instructions, with LANES the numbers that one register holds; `__init__.py` loads what fits the
 * machine. Threads are OpenMP's, of the library that torch has loaded.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifndef LANES
#define LANES 4
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define UNROLL _Pragma("GCC unroll 16")

/* Another number whenever an argument gets another meaning. */
int batchjac_version(void) { return 1; }

static int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

static void *room(int64_t floats) { return aligned_alloc(64, up(floats * (int64_t)sizeof(float), 64)); }

/* ---------------------------------------------------------------- convolution toward its input
 *
 *   x[r,c,h,w] = sum_{o,k,l} g[r,o,p,q] w[o,c,k,l]    over  p s + k d - a = h,  q t + l e - b = w
 *
 * The places of the input with one remainder by the stride form a phase: they read g with shifts
 * of their own. The planes of g are copied into rows with zeros between, so that every tap of a
 * phase is one shift of the whole plane, seen as a single row of numbers. A tile of C channels and
 * V vectors of places stays in registers while all taps of all planes are added.
 */
enum { NO_MEMORY = 1, NOT_FINITE = 2 };

typedef struct {
  int64_t images, o, p, q, c, h, w, k, l; /* sizes */
  int64_t gr, go, gp, gq;                 /* strides of g */
  int64_t s, t, a, b, d, e;               /* stride, padding, dilation, for each axis */
} Convolution;

#define TILE(C, V)                                                                                 \
  static void tile_##C##_##V(const float *g, int64_t plane, int64_t o, const int64_t *at,          \
                             int64_t taps, const float *w, float *x, int64_t width) {              \
    vec sum[C][V];                                                                                 \
    UNROLL for (int c = 0; c < C; c++) UNROLL for (int v = 0; v < V; v++) sum[c][v] = (vec){0};    \
    for (int64_t i = 0; i < o; i++, g += plane)                                                    \
      for (int64_t k = 0; k < taps; k++, w += C) {                                                 \
        vec y[V];                                                                                  \
        UNROLL for (int v = 0; v < V; v++) y[v] = *(const vec *)(g + at[k] + v * LANES);           \
        UNROLL for (int c = 0; c < C; c++)                                                         \
          UNROLL for (int v = 0; v < V; v++) sum[c][v] += w[c] * y[v];                             \
      }                                                                                            \
    UNROLL for (int c = 0; c < C; c++)                                                             \
      UNROLL for (int v = 0; v < V; v++) *(vec *)(x + c * width + v * LANES) = sum[c][v];          \
  }

/* All places of C channels. What is left after the last whole tile goes one vector at a time, where
 * those are few, else as one more tile, which reads and writes beyond the end: there is room. */
#define GROUP(C, V)                                                                                \
  TILE(C, V)                                                                                       \
  TILE(C, 1)                                                                                       \
  static void group_##C(const float *g, int64_t plane, int64_t o, const int64_t *at, int64_t taps, \
                        const float *w, float *x, int64_t stride, int64_t width) {                 \
    int64_t f = 0;                                                                                 \
    for (; f + (V > 3 ? V / 2 : V - 1) * LANES < width; f += V * LANES)                            \
      tile_##C##_##V(g + f, plane, o, at, taps, w, x + f, stride);                                 \
    for (; f < width; f += LANES) tile_##C##_1(g + f, plane, o, at, taps, w, x + f, stride);       \
  }

/* Sums and what they are made of must fit 32 registers, or 16. */
#if LANES == 8
#define MOST 4
#define WIDEST 8
GROUP(1, 8) GROUP(2, 5) GROUP(3, 3) GROUP(4, 2)
#else
#define MOST 8
#define WIDEST 12
GROUP(1, 12) GROUP(2, 10) GROUP(3, 8) GROUP(4, 6) GROUP(5, 4) GROUP(6, 4) GROUP(7, 3) GROUP(8, 3)
#endif

typedef void Group(const float *, int64_t, int64_t, const int64_t *, int64_t, const float *,
                   float *, int64_t, int64_t);
static Group *const groups[] = {
    0, group_1, group_2, group_3, group_4,
#if MOST == 8
    group_5, group_6, group_7, group_8,
#endif
};

/* Along one axis: tap k of the phase y reads g at place j + shift, if this is a whole number. */
static int shift(int64_t y, int64_t k, int64_t stride, int64_t padding, int64_t dilation, int64_t *to) {
  int64_t n = y + padding - k * dilation;
  int64_t rest = (n % stride + stride) % stride;
  *to = (n - rest) / stride;
  return rest == 0;
}

/* How far beyond g's first and last place its taps read. */
static void reach(int64_t size, int64_t g, int64_t taps, int64_t stride, int64_t padding,
                  int64_t dilation, int64_t *before, int64_t *after) {
  *before = *after = 0;
  for (int64_t y = 0; y < stride; y++)
    for (int64_t k = 0; k < taps; k++) {
      int64_t by;
      if (!shift(y, k, stride, padding, dilation, &by)) continue;
      int64_t last = (size + stride - 1) / stride - 1 + by - (g - 1);
      if (-by > *before) *before = -by;
      if (last > *after) *after = last;
    }
}

int batchjac_toward_input(const float *g, const float *w, float *x, const Convolution *z, int threads) {
  int64_t low, high, left, right;
  reach(z->h, z->p, z->k, z->s, z->a, z->d, &low, &high);
  reach(z->w, z->q, z->l, z->t, z->b, z->e, &left, &right);
  int64_t js = (z->h + z->s - 1) / z->s, is = (z->w + z->t - 1) / z->t;
  int64_t row = z->q + (left > right ? left : right); /* zeros after a row serve the next as well */
  if (row < is) row = is;
  int64_t width = (js - 1) * row + is, stride = up(width, LANES) + WIDEST * LANES;
  int64_t plane = up((low + z->p + high) * row + left + right + 2 * WIDEST * LANES, LANES);
  int64_t phases = z->s * z->t, most = z->k * z->l, part = most * z->o * z->c;

  int64_t *at = malloc(sizeof(int64_t) * (phases * (most + 1) + most));
  float *packed = malloc(sizeof(float) * phases * part);
  int failed = at && packed ? 0 : NO_MEMORY;
  int64_t *count = at + phases * most, *which = count + phases;
  for (int64_t f = 0; f < phases && !failed; f++) { /* the weights, C channels side by side */
    int64_t n = 0, dp, dq;
    for (int64_t k = 0; k < z->k; k++)
      for (int64_t l = 0; l < z->l; l++)
        if (shift(f / z->t, k, z->s, z->a, z->d, &dp) && shift(f % z->t, l, z->t, z->b, z->e, &dq)) {
          at[f * most + n] = (dp + low) * row + dq + left;
          which[n++] = k * z->l + l;
        }
    count[f] = n;
    float *to = packed + f * part;
    for (int64_t from = 0; from < z->c; from += MOST)
      for (int64_t o = 0; o < z->o; o++)
        for (int64_t i = 0; i < n; i++)
          for (int64_t c = from; c < z->c && c < from + MOST; c++)
            *to++ = w[(o * z->c + c) * most + which[i]];
  }
  /* beyond g's ends zeros meet the taps, which must leave zeros */
  float whole = 0;
  for (int64_t i = 0; i < z->o * z->c * most && !failed; i++) whole += w[i] * 0;
  if (whole != 0) failed = NOT_FINITE;

  if (failed) {
    free(at);
    free(packed);
    return failed;
  }

#pragma omp parallel num_threads(threads)
  {
    float *planes = room(z->o * plane), *made = room(MOST * stride);
    if (!planes || !made)
#pragma omp atomic write
      failed = NO_MEMORY;
    else
      memset(planes, 0, sizeof(float) * z->o * plane);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t r = 0; r < (failed ? 0 : z->images); r++) {
      for (int64_t o = 0; o < z->o; o++)
        for (int64_t p = 0; p < z->p; p++) {
          const float *from = g + r * z->gr + o * z->go + p * z->gp;
          float *to = planes + o * plane + (p + low) * row + left;
          if (z->gq == 1)
            memcpy(to, from, sizeof(float) * z->q);
          else
            for (int64_t q = 0; q < z->q; q++) to[q] = from[q * z->gq];
        }
      for (int64_t f = 0; f < phases; f++) {
        const float *weights = packed + f * part;
        int64_t y = f / z->t, i = f % z->t;
        int64_t rows = (z->h - y + z->s - 1) / z->s, columns = (z->w - i + z->t - 1) / z->t;
        for (int64_t c = 0; c < z->c; c += MOST) {
          int64_t some = z->c - c < MOST ? z->c - c : MOST;
          groups[some](planes, plane, z->o, at + f * most, count[f], weights, made, stride, width);
          weights += some * z->o * count[f];
          for (int64_t k = 0; k < some; k++)
            for (int64_t j = 0; j < rows; j++) {
              float *to = x + ((r * z->c + c + k) * z->h + y + j * z->s) * z->w + i;
              const float *from = made + k * stride + j * row;
              if (z->t == 1)
                memcpy(to, from, sizeof(float) * columns);
              else
                for (int64_t n = 0; n < columns; n++) to[n * z->t] = from[n];
            }
        }
      }
    }
    free(planes);
    free(made);
  }
  free(at);
  free(packed);
  return failed;
}

/* ---------------------------------------------------------------- products of thin matrices
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
      if (r < rows) UNROLL for (int v = 0; v < V; v++) *(vec *)(y + r * z->yi + v * LANES) = sum[r][v]; \
  }                                                                                                \
  /* R rows of y, V vectors at a time; the last are moved back to its end, over some done before */ \
  static void rows_##R##_##V(const float *a, const float *b, float *y, const Product *z, int rows) { \
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
#define STRIPS(vecs) ((vecs) == 1 ? rows_14_1 : (vecs) == 2 ? rows_10_2 : (vecs) == 3 ? rows_8_3 : rows_6_4)
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
      STRIPS(vecs)(a + n * z->an + first * z->ai, b + n * z->bn, y + n * z->yn + first * z->yi, z, rows);
    }
}

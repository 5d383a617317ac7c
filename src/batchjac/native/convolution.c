#include "vectors.h"

/* Convolution toward its input.
 *
 *   x[r,c,h,w] = sum_{o,k,l} g[r,o,p,q] w[o,c,k,l]    over  p s + k d - a = h,  q t + l e - b = w
 *
 * The places of the input with one remainder by the stride form a phase: they read g with shifts
 * of their own. The planes of g are copied into rows with zeros between, so that every tap of a
 * phase is one shift of the whole plane, seen as a single row of numbers. A tile of C channels and
 * V vectors of places stays in registers while all taps of all planes are added.
 */
static int64_t up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

static void *room(int64_t floats) {
  return aligned_alloc(64, up(floats * (int64_t)sizeof(float), 64));
}

enum { NO_MEMORY = 1, DECLINED = 2 };

typedef struct {
  int64_t images, o, p, q, c, h, w, k, l; /* sizes */
  int64_t gr, go, gp, gq;                 /* strides of g */
  int64_t s, t, a, b, d, e;               /* stride, padding, dilation, for each axis */
  /* Where g holds only some places of each plane: g[v,n,o,j] at index[n,o,j], images are v n. */
  const int64_t *index;
  int64_t rows, places;
} Convolution;

/* Numbers in a row: memcpy costs more than the copy of few. */
static inline void copy(float *to, const float *from, int64_t n) {
  if (n < LANES) {
    for (int64_t i = 0; i < n; i++) to[i] = from[i];
    return;
  }
  for (int64_t i = 0; i + LANES <= n; i += LANES) *(vec *)(to + i) = *(const vec *)(from + i);
  *(vec *)(to + n - LANES) = *(const vec *)(from + n - LANES);
}

#define STAYS(l, h) ((l) & (h) ? LANES + (l) - (h) : (l))
#define CROSSES(l, h) ((l) & (h) ? LANES + (l) : (l) + (h))
#define TURNS(l, h) ((l) / 2 + (l) % 2 * LANES) /* of two vectors in turns */
#define FOUR(F, l, h) F(l, h), F((l) + 1, h), F((l) + 2, h), F((l) + 3, h)
#if LANES == 16
#define EACH(F, h) FOUR(F, 0, h), FOUR(F, 4, h), FOUR(F, 8, h), FOUR(F, 12, h)
#elif LANES == 8
#define EACH(F, h) FOUR(F, 0, h), FOUR(F, 4, h)
#else
#define EACH(F, h) FOUR(F, 0, h)
#endif
#define STAGE(h)                                                                                   \
  UNROLL for (int i = 0; i < LANES; i++)                                                           \
    if (!(i & (h))) {                                                                              \
      const vec a = x[i], b = x[i + (h)];                                                          \
      x[i] = SHUFFLE(a, b, EACH(STAYS, h));                                       \
      x[i + (h)] = SHUFFLE(a, b, EACH(CROSSES, h));                               \
    }

/* A square of numbers turned over: at each stage blocks of half the size change places. */
static inline void turned(float *to, int64_t down, const float *from, int64_t along) {
  vec x[LANES];
  UNROLL for (int i = 0; i < LANES; i++) x[i] = *(const vec *)(from + i * along);
#if LANES >= 16
  STAGE(8)
#endif
#if LANES >= 8
  STAGE(4)
#endif
  STAGE(2)
  STAGE(1)
  UNROLL for (int i = 0; i < LANES; i++) *(vec *)(to + i * down) = x[i];
}

/* One row of places with the channels side by side, into a row of each channel's plane. */
static void apart(float *to, int64_t plane, const float *from, const Convolution *z) {
  int64_t o = 0;
  for (; o + LANES <= z->o; o += LANES) {
    int64_t q = 0;
    for (; q + LANES <= z->q; q += LANES)
      turned(to + o * plane + q, plane, from + q * z->gq + o, z->gq);
    for (; q < z->q; q++)
      for (int64_t i = o; i < o + LANES; i++) to[i * plane + q] = from[q * z->gq + i];
  }
  for (; o < z->o; o++)
    for (int64_t q = 0; q < z->q; q++) to[o * plane + q] = from[q * z->gq + o];
}

/* A row of n places from the rows of its t phases, which are `apart` numbers from each other. */
static inline void together(float *to, const float *from, int64_t apart, int64_t t, int64_t n) {
  if (t == 1) {
    copy(to, from, n);
    return;
  }
  if (t > 2) {
    for (int64_t u = 0; u < t; u++)
      for (int64_t i = u; i < n; i += t) to[i] = from[u * apart + i / t];
    return;
  }
  int64_t i = 0;
  for (; 2 * i + LANES <= n; i += LANES / 2)
    *(vec *)(to + 2 * i) =
        SHUFFLE(*(const vec *)(from + i), *(const vec *)(from + apart + i), EACH(TURNS, 0));
  for (; 2 * i < n; i++) {
    to[2 * i] = from[i];
    if (2 * i + 1 < n) to[2 * i + 1] = from[apart + i];
  }
}

/* The planes of one image among their zeros. */
static void spread(float *planes, const float *g, const Convolution *z, int64_t plane, int64_t row,
                   int64_t corner) {
  for (int64_t p = 0; z->go == 1 && p < z->p; p++)
    apart(planes + p * row + corner, plane, g + p * z->gp, z);
  for (int64_t o = 0; z->go != 1 && o < z->o; o++)
    for (int64_t p = 0; p < z->p; p++) {
      const float *from = g + o * z->go + p * z->gp;
      float *to = planes + o * plane + p * row + corner;
      if (z->gq == 1)
        copy(to, from, z->q);
      else
        for (int64_t q = 0; q < z->q; q++) to[q] = from[q * z->gq];
    }
}

/* Where the places of a sample are among these zeros; 0 where one of them is in no plane. */
static int locate(int32_t *where, const int64_t *index, const Convolution *z, int64_t plane,
                  int64_t row, int64_t corner) {
  /* at / q by a product, which vectors have; exact for at < p q where p q q < 2^32 */
  const uint64_t part = (((uint64_t)1 << 32) + z->q - 1) / z->q;
  const int64_t more = row - z->q, size = z->p * z->q;
  const int exact = size < ((int64_t)1 << 32) / z->q;
  uint64_t last = 0; /* a negative one is taken for a large one */
  for (int64_t o = 0; o < z->o; o++, index += z->places, where += z->places) {
    const int32_t from = (int32_t)(o * plane + corner);
    for (int64_t j = 0; j < z->places; j++)
      last = (uint64_t)index[j] > last ? (uint64_t)index[j] : last;
    if (more == 0 || z->p == 1)
      for (int64_t j = 0; j < z->places; j++) where[j] = from + (int32_t)index[j];
    else if (exact)
      for (int64_t j = 0; j < z->places; j++)
        where[j] = from + (int32_t)(index[j] + ((uint64_t)index[j] * part >> 32) * more);
    else
      for (int64_t j = 0; j < z->places; j++)
        where[j] = from + (int32_t)(index[j] + index[j] / z->q * more);
  }
  return last < (uint64_t)size;
}

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
static int shift(int64_t y, int64_t k, int64_t stride, int64_t padding, int64_t dilation,
                 int64_t *to) {
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

/* The same where g holds few places of each plane, in the same order for all rows of a sample: a
 * register holds as many rows, and every place adds its taps to a plane of the input that stays in
 * the cache. */
static inline __attribute__((always_inline)) void add(float *to, const float *tap, vec y,
                                                      int64_t k, int64_t l, int64_t down,
                                                      int64_t beside) {
  for (int64_t i = 0; i < k; i++, to += down, tap += l)
    UNROLL for (int64_t j = 0; j < l; j++) *(vec *)(to + j * beside) += tap[j] * y;
}

static int from_places(const float *g, const float *w, float *x, const Convolution *z,
                       int threads) {
  const int64_t some = z->o * z->places, taps = z->k * z->l, samples = z->images / z->rows;
  int64_t high = (z->p - 1) * z->s + (z->k - 1) * z->d + 1;
  int64_t wide = (z->q - 1) * z->t + (z->l - 1) * z->e + 1;
  if (high < z->a + z->h) high = z->a + z->h;
  if (wide < z->b + z->w) wide = z->b + z->w;
  if (high * wide * LANES > INT32_MAX) return DECLINED;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
    float *rows = room(some * LANES), *plane = room(high * wide * LANES);
    int32_t *where = malloc(sizeof(int32_t) * (some + 1));
    if (!rows || !plane || !where)
#pragma omp atomic write
      failed = NO_MEMORY;
    else
      memset(rows, 0, sizeof(float) * some * LANES);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t n = 0; n < (failed ? 0 : samples); n++) {
      for (int64_t i = 0; i < some; i++) {
        int64_t at = z->index[n * some + i];
        if (at < 0 || at >= z->p * z->q) {
#pragma omp atomic write
          failed = DECLINED;
          at = 0;
        }
        where[i] = (int32_t)((at / z->q * z->s * wide + at % z->q * z->t) * LANES);
      }
      for (int64_t first = 0; first < z->rows; first += LANES) {
        const int64_t many = z->rows - first < LANES ? z->rows - first : LANES;
        for (int64_t v = 0; v < many; v++) {
          const float *from = g + ((first + v) * samples + n) * some;
          for (int64_t i = 0; i < some; i++) rows[i * LANES + v] = from[i];
        }
        for (int64_t c = 0; c < z->c; c++) {
          memset(plane, 0, sizeof(float) * high * wide * LANES);
          for (int64_t o = 0, i = 0; o < z->o; o++) {
            const float *tap = w + (o * z->c + c) * taps;
            for (int64_t j = 0; j < z->places; j++, i++) {
              const vec y = *(const vec *)(rows + i * LANES);
              float *to = plane + where[i];
              const int64_t down = z->d * wide * LANES, beside = z->e * LANES;
              if (z->l == 3 && z->e == 1)
                add(to, tap, y, z->k, 3, down, LANES);
              else if (z->l == 5 && z->e == 1)
                add(to, tap, y, z->k, 5, down, LANES);
              else
                add(to, tap, y, z->k, z->l, down, beside);
            }
          }
          for (int64_t v = 0; v < many; v++)
            for (int64_t h = 0; h < z->h; h++) {
              float *to = x + ((((first + v) * samples + n) * z->c + c) * z->h + h) * z->w;
              const float *from = plane + ((h + z->a) * wide + z->b) * LANES + v;
              for (int64_t i = 0; i < z->w; i++) to[i] = from[i * LANES];
            }
        }
      }
    }
    free(rows);
    free(plane);
    free(where);
  }
  return failed;
}

int batchjac_toward_input(const float *g, const float *w, float *x, const Convolution *z,
                          int threads) {
  int64_t low, high, left, right;
  reach(z->h, z->p, z->k, z->s, z->a, z->d, &low, &high);
  reach(z->w, z->q, z->l, z->t, z->b, z->e, &left, &right);
  int64_t js = (z->h + z->s - 1) / z->s, is = (z->w + z->t - 1) / z->t;
  int64_t row = z->q + (left > right ? left : right); /* zeros after a row serve the next as well */
  if (row < is) row = is;
  int64_t width = (js - 1) * row + is, stride = up(width, LANES) + WIDEST * LANES;
  int64_t plane = up((low + z->p + high) * row + left + right + 2 * WIDEST * LANES, LANES);
  int64_t phases = z->s * z->t, most = z->k * z->l, part = most * z->o * z->c;
  int64_t some = z->index ? z->o * z->places : 0;

  /* beyond g's ends zeros meet the taps, which must leave zeros */
  float whole = 0;
  for (int64_t i = 0; i < z->o * z->c * most; i++) whole += w[i] * 0;
  if (whole != 0 || (some && z->o * plane > INT32_MAX)) return DECLINED;

  /* Vectors that are added to planes in memory, one in a cycle, beside those in registers, two. A
   * thread holds LANES rows there, however few there are, of one sample. */
  if (some && z->rows >= LANES / 2 && z->images / z->rows >= threads &&
      (z->rows + LANES - 1) / LANES * z->places < z->rows * width / (2 * LANES))
    return from_places(g, w, x, z, threads);

  int64_t *at = malloc(sizeof(int64_t) * (phases * (most + 1) + most));
  float *packed = malloc(sizeof(float) * phases * part);
  int failed = at && packed ? 0 : NO_MEMORY;
  int64_t *count = at + phases * most, *which = count + phases;
  for (int64_t f = 0; f < phases && !failed; f++) { /* the weights, C channels side by side */
    int64_t n = 0, dp, dq;
    for (int64_t k = 0; k < z->k; k++)
      for (int64_t l = 0; l < z->l; l++)
        if (shift(f / z->t, k, z->s, z->a, z->d, &dp) &&
            shift(f % z->t, l, z->t, z->b, z->e, &dq)) {
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
  if (failed) {
    free(at);
    free(packed);
    return failed;
  }

#pragma omp parallel num_threads(threads)
  {
    float *planes = room(z->o * plane), *made = room(z->t * MOST * stride);
    int32_t *where = malloc(sizeof(int32_t) * (some + 1));
    int64_t sample = -1; /* whose places are among the zeros */
    if (!planes || !made || !where)
#pragma omp atomic write
      failed = NO_MEMORY;
    else
      memset(planes, 0, sizeof(float) * z->o * plane);
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < (failed ? 0 : z->images); i++) {
      /* all rows of a sample one after the other */
      const int64_t n = i / z->rows, r = z->index ? i % z->rows * (z->images / z->rows) + n : i;
      if (z->index) {
        if (n != sample) {
          for (int64_t j = 0; sample >= 0 && j < some; j++) planes[where[j]] = 0;
          int inside = locate(where, z->index + n * some, z, plane, row, low * row + left);
          sample = inside ? n : -1;
          if (!inside) {
#pragma omp atomic write
            failed = DECLINED;
          }
        }
        if (sample < 0) continue; /* nothing was written, and nothing will be believed */
        for (int64_t j = 0; j < some; j++) planes[where[j]] = g[r * some + j];
      } else
        spread(planes, g + r * z->gr, z, plane, row, low * row + left);
      for (int64_t y = 0; y < z->s; y++)
        for (int64_t c = 0; c < z->c; c += MOST) {
          int64_t group = z->c - c < MOST ? z->c - c : MOST;
          for (int64_t u = 0; u < z->t; u++) {
            int64_t f = y * z->t + u;
            groups[group](planes, plane, z->o, at + f * most, count[f],
                          packed + f * part + c * z->o * count[f], made + u * MOST * stride,
                          stride, width);
          }
          for (int64_t k = 0; k < group; k++)
            for (int64_t j = 0; y + j * z->s < z->h; j++)
              together(x + ((r * z->c + c + k) * z->h + y + j * z->s) * z->w,
                       made + k * stride + j * row, MOST * stride, z->t, z->w);
        }
    }
    free(planes);
    free(made);
    free(where);
  }
  free(at);
  free(packed);
  return failed;
}

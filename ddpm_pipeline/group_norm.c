/* GroupNorm, and SiLU and dropout after it, over channels-last images: see group_norm.py, which calls this.

   x, y, dy, dx: (images, pixels, channels), bfloat16 or float; everything else is float. With v in group g of an image:
       z = weight (v - mean_g) / sqrt(variance_g + eps) + bias,    y = z, or z sigmoid(z),    then dropout
   Pixels are summed in segments of a fixed length, so results do not depend on the number of threads. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define SEGMENT 256 /* pixels */
#define WIDTH 64    /* channels that a loop should have at least, for the vector unit */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    long images, pixels, channels, groups;
    float eps;
    int silu, bf16;
    float kept;      /* what dropout multiplies with, 1 / (1 - its probability); 0 for no dropout */
    uint32_t dropped; /* 2^32 times its probability */
    uint64_t key;    /* of its random numbers */
} Shape;

typedef struct { /* where in the image a thread works */
    long image, first, end;
} Segment;

INLINE float load(const void *x, long i, int bf16) {
    if (!bf16)
        return ((const float *)x)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)x)[i] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE void store(void *x, long i, float value, int bf16) {
    if (!bf16) {
        ((float *)x)[i] = value;
        return;
    }
    uint32_t bits; /* to the nearest, ties to even; a NaN stays one, for its upper bits are not all lost */
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    ((uint16_t *)x)[i] = (uint16_t)((value == value ? rounded : 0x7fc00000u) >> 16);
}

/* e^x to 1e-7, as 2^n e^r with |r| <= ln(2) / 2 and a Taylor polynomial; the C library's is not vectorised. */
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x; /* further out SiLU is z or 0 */
    x = x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -0.693145752f, x);
    r = fmaf(n, -1.42860677e-6f, r);
    float p = 1.0f / 5040;
    p = fmaf(p, r, 1.0f / 720);
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p * r, r, r) + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* How many pixels one loop takes together: with few channels a loop over those of one pixel would be too short. */
INLINE long pixels_at_once(long channels, long pixels) {
    long n = 1;
    while (n * channels < WIDTH && pixels % (2 * n) == 0)
        n *= 2;
    return n;
}

/* Random number `index` of a stream: SplitMix64, as in rng.py. */
INLINE uint64_t random_bits(uint64_t key, uint64_t index) {
    uint64_t z = (index + 1) * 0x9e3779b97f4a7c15u + key;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* What dropout multiplies the pixels that one loop takes with: the same numbers forward and backward, not stored. A
   random number serves two channels. */
INLINE void dropout(Shape s, long width, long loop, float *factor) {
    long pairs = (width + 1) / 2;
#pragma omp simd
    for (long i = 0; i < pairs; i++) {
        uint64_t bits = random_bits(s.key, loop * pairs + i);
        factor[2 * i] = (uint32_t)bits < s.dropped ? 0 : s.kept;
        factor[2 * i + 1] = (uint32_t)(bits >> 32) < s.dropped ? 0 : s.kept;
    }
}

/* z = scale v + shift, for each channel, repeated for the pixels that one loop takes. */
INLINE void affine(Shape s, long n, long image, const float *weight, const float *bias, const float *mean,
                   const float *rstd, float *scale, float *shift) {
    for (long c = 0; c < n * s.channels; c++) {
        long channel = c % s.channels, group = image * s.groups + channel / (s.channels / s.groups);
        scale[c] = weight[channel] * rstd[group];
        shift[c] = bias[channel] - mean[group] * scale[c];
    }
}

/* Two sums of each channel, from those of the pixels that one loop takes. */
INLINE void add_up(Shape s, long width, const float *first, const float *second, float *sums) {
    memset(sums, 0, 2 * s.channels * sizeof(float));
    for (long c = 0; c < width; c++) {
        sums[c % s.channels] += first[c];
        sums[s.channels + c % s.channels] += second[c];
    }
}

/* About the mean of a channel: that of some of its pixels, so that a single one far out does not count. */
INLINE float about_mean(Shape s, const void *x, long image, long channel) {
    float sum = 0;
    for (long i = 0; i < 8; i++)
        sum += load(x, (image * s.pixels + i * s.pixels / 8) * s.channels + channel, s.bf16);
    return sum / 8;
}

/* Sums of v - v_0 and its square of each channel over a segment; v_0 is about the mean. Without it the squares would
   cancel where the mean is far larger than the standard deviation. */
INLINE void sum_segment(Shape s, Segment at, const void *x, float *sums) {
    long n = pixels_at_once(s.channels, s.pixels), width = n * s.channels;
    float origin[width], first[width], second[width];
    for (long c = 0; c < width; c++)
        origin[c] = c < s.channels ? about_mean(s, x, at.image, c) : origin[c - s.channels];
    memset(first, 0, sizeof first);
    memset(second, 0, sizeof second);
    for (long p = at.first; p < at.end; p += n) {
        long start = (at.image * s.pixels + p) * s.channels;
#pragma omp simd
        for (long c = 0; c < width; c++) {
            float v = load(x, start + c, s.bf16) - origin[c];
            first[c] += v;
            second[c] += v * v;
        }
    }
    add_up(s, width, first, second, sums);
}

/* Mean and 1 / sqrt(variance + eps) of each group of an image. The variance is that within the channels and that of
   their means. */
INLINE void statistics(Shape s, long image, long segments, const void *x, const float *sums, float *mean, float *rstd) {
    long size = s.channels / s.groups;
    for (long g = 0; g < s.groups; g++) {
        double means[size], total = 0, squares = 0;
        for (long c = 0; c < size; c++) {
            double first = 0, second = 0;
            for (long i = 0; i < segments; i++) {
                const float *of_segment = sums + (image * segments + i) * 2 * s.channels + g * size + c;
                first += of_segment[0];
                second += of_segment[s.channels];
            }
            means[c] = first / s.pixels + about_mean(s, x, image, g * size + c);
            squares += second - first * first / s.pixels;
            total += means[c];
        }
        for (long c = 0; c < size; c++)
            squares += s.pixels * (means[c] - total / size) * (means[c] - total / size);
        double variance = squares / ((double)size * s.pixels);
        mean[image * s.groups + g] = (float)(total / size);
        rstd[image * s.groups + g] = (float)(1 / sqrt((variance < 0 ? 0 : variance) + s.eps));
    }
}

INLINE void apply_segment(Shape s, Segment at, const void *x, void *y, const float *weight, const float *bias,
                          const float *mean, const float *rstd) {
    long n = pixels_at_once(s.channels, s.pixels), width = n * s.channels;
    float scale[width], shift[width], factor[width + 1];
    affine(s, n, at.image, weight, bias, mean, rstd, scale, shift);
    for (long p = at.first; p < at.end; p += n) {
        long start = (at.image * s.pixels + p) * s.channels;
        if (s.kept)
            dropout(s, width, start / width, factor);
#pragma omp simd
        for (long c = 0; c < width; c++) {
            float z = load(x, start + c, s.bf16) * scale[c] + shift[c];
            if (s.silu)
                z /= 1 + exponential(-z);
            if (s.kept)
                z *= factor[c];
            store(y, start + c, z, s.bf16);
        }
    }
}

/* dL/dz into dx, and the sums of dL/dz and of (v - mean) dL/dz of each channel over a segment. */
INLINE void differentiate_segment(Shape s, Segment at, const void *dy, const void *x, void *dx, const float *weight,
                                  const float *bias, const float *mean, const float *rstd, float *sums) {
    long n = pixels_at_once(s.channels, s.pixels), width = n * s.channels;
    float scale[width], shift[width], centre[width], factor[width + 1], first[width], second[width];
    affine(s, n, at.image, weight, bias, mean, rstd, scale, shift);
    for (long c = 0; c < width; c++)
        centre[c] = mean[at.image * s.groups + c % s.channels / (s.channels / s.groups)];
    memset(first, 0, sizeof first);
    memset(second, 0, sizeof second);
    for (long p = at.first; p < at.end; p += n) {
        long start = (at.image * s.pixels + p) * s.channels;
        if (s.kept)
            dropout(s, width, start / width, factor);
#pragma omp simd
        for (long c = 0; c < width; c++) {
            float v = load(x, start + c, s.bf16), dz = load(dy, start + c, s.bf16);
            if (s.kept)
                dz *= factor[c];
            if (s.silu) {
                float z = v * scale[c] + shift[c], sigmoid = 1 / (1 + exponential(-z));
                dz *= sigmoid * (1 + z * (1 - sigmoid));
            }
            if (s.silu || s.kept)
                store(dx, start + c, dz, s.bf16);
            first[c] += dz;
            second[c] += (v - centre[c]) * dz;
        }
    }
    add_up(s, width, first, second, sums);
}

/* The gradients of weight and bias of one image, and with them the line dx = scale dz + slope v + offset. */
INLINE void gradients(Shape s, long image, long segments, const float *sums, const float *weight, const float *mean,
                      const float *rstd, float *dweight, float *dbias, float *slope, float *offset) {
    long size = s.channels / s.groups;
    for (long g = 0; g < s.groups; g++) {
        long group = image * s.groups + g;
        double of_z = 0, of_normal = 0, count = (double)size * s.pixels;
        for (long c = g * size; c < (g + 1) * size; c++) {
            double first = 0, second = 0;
            for (long i = 0; i < segments; i++) {
                first += sums[(image * segments + i) * 2 * s.channels + c];
                second += sums[((image * segments + i) * 2 + 1) * s.channels + c];
            }
            double normal = second * rstd[group];
            dbias[image * s.channels + c] = (float)first;
            dweight[image * s.channels + c] = (float)normal;
            of_z += weight[c] * first;
            of_normal += weight[c] * normal;
        }
        double k = -(double)rstd[group] * rstd[group] * of_normal / count;
        slope[group] = (float)k;
        offset[group] = (float)(-rstd[group] * of_z / count - mean[group] * k);
    }
}

INLINE void combine_segment(Shape s, Segment at, const void *dz, const void *x, void *dx, const float *weight,
                            const float *rstd, const float *slope, const float *offset) {
    long n = pixels_at_once(s.channels, s.pixels), width = n * s.channels;
    float scale[width], slopes[width], offsets[width];
    for (long c = 0; c < width; c++) {
        long channel = c % s.channels, group = at.image * s.groups + channel / (s.channels / s.groups);
        scale[c] = weight[channel] * rstd[group];
        slopes[c] = slope[group];
        offsets[c] = offset[group];
    }
    for (long p = at.first; p < at.end; p += n) {
        long start = (at.image * s.pixels + p) * s.channels;
#pragma omp simd
        for (long c = 0; c < width; c++) {
            float value = load(dz, start + c, s.bf16) * scale[c] + load(x, start + c, s.bf16) * slopes[c] + offsets[c];
            store(dx, start + c, value, s.bf16);
        }
    }
}

long group_norm_segments(long pixels) { return (pixels + SEGMENT - 1) / SEGMENT; }

INLINE Segment segment(Shape s, long image, long i) {
    long first = i * SEGMENT, end = first + SEGMENT;
    return (Segment){image, first, end < s.pixels ? end : s.pixels};
}

/* The compiler makes a loop of its own for each dtype, and where they matter with and without SiLU and dropout: once,
   in functions that are not inlined, for every loop costs time to compile. */
#define LOOP static __attribute__((noinline)) void
#define FOR_EACH_DTYPE(CALL) \
    do { \
        Shape given = s; \
        if (given.bf16) AS(1, CALL) \
        else AS(0, CALL) \
    } while (0)
#define AS(BF16, CALL) \
    { \
        Shape s = given; \
        s.bf16 = BF16; \
        CALL; \
    }
#define FOR_EACH_KIND(CALL) \
    do { \
        if (s.silu && s.kept) FOR_EACH_DTYPE((s.silu = 1, CALL)); \
        else if (s.silu) FOR_EACH_DTYPE((s.silu = 1, s.kept = 0, CALL)); \
        else if (s.kept) FOR_EACH_DTYPE((s.silu = 0, CALL)); \
        else FOR_EACH_DTYPE((s.silu = 0, s.kept = 0, CALL)); \
    } while (0)

LOOP sum_up(Shape s, Segment at, const void *x, float *sums) { FOR_EACH_DTYPE(sum_segment(s, at, x, sums)); }

LOOP apply(Shape s, Segment at, const void *x, void *y, const float *weight, const float *bias, const float *mean,
           const float *rstd) {
    FOR_EACH_KIND(apply_segment(s, at, x, y, weight, bias, mean, rstd));
}

LOOP differentiate(Shape s, Segment at, const void *dy, const void *x, void *dx, const float *weight, const float *bias,
                   const float *mean, const float *rstd, float *sums) {
    FOR_EACH_KIND(differentiate_segment(s, at, dy, x, dx, weight, bias, mean, rstd, sums));
}

LOOP combine(Shape s, Segment at, const void *dz, const void *x, void *dx, const float *weight, const float *rstd,
             const float *slope, const float *offset) {
    FOR_EACH_DTYPE(combine_segment(s, at, dz, x, dx, weight, rstd, slope, offset));
}

/* A thread takes whole images, which then stay in its cache; or their segments, if there are too few images. For very
   few numbers a second thread would be more work than help. */
#define IS_LARGE (s.images * s.pixels * s.channels >= 32768)
#define FOR_EACH_IMAGE \
    _Pragma("omp parallel for schedule(static) if (IS_LARGE)") for (long image = 0; image < s.images; image++)
#define FOR_EACH_SEGMENT \
    _Pragma("omp parallel for collapse(2) schedule(static) if (IS_LARGE)") \
    for (long image = 0; image < s.images; image++) \
        for (long i = 0; i < segments; i++)

void group_norm_forward(Shape s, const void *x, void *y, const float *weight, const float *bias, float *mean,
                        float *rstd, float *sums) {
    long segments = group_norm_segments(s.pixels);
#define SUM sum_up(s, segment(s, image, i), x, sums + (image * segments + i) * 2 * s.channels)
#define APPLY apply(s, segment(s, image, i), x, y, weight, bias, mean, rstd)
    if (s.images >= omp_get_max_threads()) {
        FOR_EACH_IMAGE {
            for (long i = 0; i < segments; i++)
                SUM;
            statistics(s, image, segments, x, sums, mean, rstd);
            for (long i = 0; i < segments; i++)
                APPLY;
        }
    } else {
        FOR_EACH_SEGMENT SUM;
        FOR_EACH_IMAGE statistics(s, image, segments, x, sums, mean, rstd);
        FOR_EACH_SEGMENT APPLY;
    }
}

/* dweight, dbias: (images, channels), to be summed. slope, offset: (images, groups). dx may not be dy or x. */
void group_norm_backward(Shape s, const void *dy, const void *x, void *dx, const float *weight, const float *bias,
                         const float *mean, const float *rstd, float *dweight, float *dbias, float *slope,
                         float *offset, float *sums) {
    long segments = group_norm_segments(s.pixels);
    const void *dz = s.silu || s.kept ? dx : dy;
#define DIFFERENTIATE \
    differentiate(s, segment(s, image, i), dy, x, dx, weight, bias, mean, rstd, \
                  sums + (image * segments + i) * 2 * s.channels)
#define COMBINE combine(s, segment(s, image, i), dz, x, dx, weight, rstd, slope, offset)
    if (s.images >= omp_get_max_threads()) {
        FOR_EACH_IMAGE {
            for (long i = 0; i < segments; i++)
                DIFFERENTIATE;
            gradients(s, image, segments, sums, weight, mean, rstd, dweight, dbias, slope, offset);
            for (long i = 0; i < segments; i++)
                COMBINE;
        }
    } else {
        FOR_EACH_SEGMENT DIFFERENTIATE;
        FOR_EACH_IMAGE gradients(s, image, segments, sums, weight, mean, rstd, dweight, dbias, slope, offset);
        FOR_EACH_SEGMENT COMBINE;
    }
}

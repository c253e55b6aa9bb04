/* The encoders' inner loops, once over the values instead of once for each operation.
 *
 * Plain C without Python's headers: `kernels.py` loads it by ctypes, which lets go of the interpreter's lock meanwhile. The bits
 * are those of the passes in `blocks.py` and `topk.py`, which do the work where this was not built: the same operations in the
 * same order, none contracted into another (-ffp-contract=off).
 */
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) && defined(__x86_64__) && defined(__gnu_linux__)
/* One version for each kind of processor; the loader takes the best that this one has. */
#define CLONES __attribute__((target_clones("default", "avx2", "arch=skylake-avx512")))
#else
#define CLONES
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
/* The linker of a Python extension asks for it. */
EXPORT void *PyInit__kernels(void) { return 0; }
#else
#define EXPORT
#endif

#if defined(__GNUC__)
#define MAY_ALIAS __attribute__((may_alias))
#else
#define MAY_ALIAS
#endif

typedef int32_t MAY_ALIAS word;
typedef uint32_t MAY_ALIAS quad;
typedef uint64_t MAY_ALIAS octet;

/* `MOST_BLOCK` of kernels.py. */
#define MOST_BLOCK 1024
#define PIECE 1024
#define INFINITE 0x7F800000
#define NOT_A_NUMBER 0x7FC00000
#define POSITIVE 0x7FFFFFFF
#define SMALLEST_NORMAL 0x00800000

static inline float float_of(int32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline int32_t bits_of(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* `values` in blocks of `block` (a multiple of 8, at most MOST_BLOCK; the last is filled up with zeros) as integers of 2, 3, 4 or 8
 * bits. `noise`, where it is not null, has a number for each value of every block. `scales` gets bfloat16 bits; `out` has room for
 * whole blocks. */
EXPORT CLONES void fusion_encode_blocks(const float *values, int64_t elements, int64_t block, int32_t bits,
                                        const int16_t *noise, uint16_t *scales, uint8_t *out)
{
    const int32_t levels = (1 << (bits - 1)) - 1;
    const float bound = (float)levels;
    /* Adding this leaves a float's last bits holding the nearest integer, biased so that it is positive where it is packed. */
    const float nearest = 12582912.0f + (bits < 8 ? (float)(1 << (bits - 1)) : 0.0f);
    const int64_t blocks = (elements + block - 1) / block;
    float scratch[MOST_BLOCK], filled[MOST_BLOCK];
    uint64_t words[MOST_BLOCK / 8];
    uint8_t *const integers = (uint8_t *)words;

    for (int64_t index = 0; index < blocks; index++) {
        const float *part = values + index * block;
        if ((index + 1) * block > elements) {
            const int64_t known = elements - index * block;
            memcpy(filled, part, known * sizeof *filled);
            memset(filled + known, 0, (block - known) * sizeof *filled);
            part = filled;
        }
        /* As integers, so that a NaN is above infinity and infinity above the rest. */
        const word *magnitudes = (const word *)part;
        int32_t largest = 0;
        for (int64_t i = 0; i < block; i++) {
            const int32_t magnitude = magnitudes[i] & POSITIVE;
            largest = magnitude > largest ? magnitude : largest;
        }
        float factor = 0.0f;
        int32_t scale = NOT_A_NUMBER;
        if (largest < INFINITE) {
            scale = bits_of(float_of(largest) / bound);
            scale = scale < SMALLEST_NORMAL ? SMALLEST_NORMAL : scale;
        }
        const int odd = scale >= INFINITE;
        /* Rounded up to bfloat16. */
        scale = (scale + 0xFFFF) >> 16;
        if (!odd)
            factor = 1.0f / float_of(scale << 16);
        scales[index] = (uint16_t)scale;

        for (int64_t i = 0; i < block; i++)
            scratch[i] = part[i] * factor;
        if (noise) {
            const int16_t *own = noise + index * block;
            for (int64_t i = 0; i < block; i++) {
                float value = scratch[i] + (float)own[i] * 0x1p-16f;
                value = value < -bound ? -bound : value;
                scratch[i] = value > bound ? bound : value;
            }
        }
        for (int64_t i = 0; i < block; i++)
            scratch[i] += nearest;
        const word *found = (const word *)scratch;

        if (bits == 8) {
            uint8_t *room = out + index * block;
            for (int64_t i = 0; i < block; i++)
                room[i] = (uint8_t)found[i];
            continue;
        }
        for (int64_t i = 0; i < block; i++)
            integers[i] = (uint8_t)found[i];
        uint8_t *room = out + index * block * bits / 8;
        /* A value is moved next to its neighbour within a wider word, pair by pair: little-endian, as the frames are. */
        if (bits == 4) {
            for (int64_t i = 0; i < block / 2; i++) {
                const uint32_t pair = (uint32_t)integers[2 * i] | (uint32_t)integers[2 * i + 1] << 8;
                room[i] = (uint8_t)(pair | pair >> 4);
            }
        } else if (bits == 2) {
            const quad *quads = (const quad *)integers;
            for (int64_t i = 0; i < block / 4; i++) {
                const uint32_t halves = quads[i] | quads[i] >> 6;
                room[i] = (uint8_t)(halves | halves >> 12);
            }
        } else {
            const octet *octets = (const octet *)integers;
            for (int64_t i = 0; i < block / 8; i++) {
                uint64_t packed = (octets[i] | octets[i] >> 5) & 0x003F003F003F003Full;
                packed = (packed | packed >> 10) & 0x00000FFF00000FFFull;
                packed |= packed >> 20;
                room[3 * i] = (uint8_t)packed;
                room[3 * i + 1] = (uint8_t)(packed >> 8);
                room[3 * i + 2] = (uint8_t)(packed >> 16);
            }
        }
    }
}

/* Eight bytes that are 0 or 1 as eight bits. */
static inline uint32_t eight(uint64_t bytes)
{
    return (uint32_t)(bytes * 0x0102040810204080ull >> 56);
}

/* The place of the lowest bit that is set. */
static inline int lowest(uint32_t bits)
{
#if defined(__GNUC__)
    return __builtin_ctz(bits);
#else
    int place = 0;
    for (; !(bits & 1); bits >>= 1)
        place++;
    return place;
#endif
}

/* Positions of the values whose bits without their sign are at least `threshold`, ascending; `out` has room for all. Comparing is
 * done for many at once; as most are smaller, 32 answers are looked at together before each is. */
#define AT_LEAST(name, type, positive)                                                                                 \
    EXPORT CLONES int64_t name(const type *values, int64_t elements, type threshold, int64_t *out)                     \
    {                                                                                                                  \
        uint64_t answers[PIECE / 8];                                                                                   \
        uint8_t *const large = (uint8_t *)answers;                                                                     \
        int64_t count = 0;                                                                                             \
        for (int64_t first = 0; first < elements; first += PIECE) {                                                    \
            const type *piece = values + first;                                                                        \
            const int64_t rest = elements - first;                                                                     \
            if (rest >= PIECE)                                                                                         \
                for (int i = 0; i < PIECE; i++)                                                                        \
                    large[i] = (piece[i] & positive) >= threshold;                                                     \
            else                                                                                                       \
                for (int i = 0; i < PIECE; i++)                                                                        \
                    large[i] = i < rest && (piece[i] & positive) >= threshold;                                         \
            for (int i = 0; i < PIECE / 8; i += 4)                                                                     \
                if (answers[i] | answers[i + 1] | answers[i + 2] | answers[i + 3]) {                                   \
                    uint32_t found = eight(answers[i]) | eight(answers[i + 1]) << 8 | eight(answers[i + 2]) << 16 |    \
                                     eight(answers[i + 3]) << 24;                                                      \
                    do                                                                                                 \
                        out[count++] = first + 8 * i + lowest(found);                                                  \
                    while (found &= found - 1);                                                                        \
                }                                                                                                      \
        }                                                                                                              \
        return count;                                                                                                  \
    }

/* Signed, because that is what processors compare: without the sign all are positive. */
AT_LEAST(fusion_at_least_32, int32_t, 0x7FFFFFFF)
AT_LEAST(fusion_at_least_16, int16_t, 0x7FFF)

/* Gaps between ascending positions (the first: to -1), less one, as LEB128. Returns the number of bytes, or -1 as soon as it would be
 * over `most`; `out` has room for `most`. */
EXPORT int64_t fusion_write_varints(const int64_t *positions, int64_t count, int64_t most, uint8_t *out)
{
    int64_t before = -1, size = 0;
    for (int64_t i = 0; i < count; i++) {
        uint64_t gap = (uint64_t)(positions[i] - before - 1);
        before = positions[i];
        for (;; gap >>= 7) {
            if (size == most)
                return -1;
            if (gap < 128)
                break;
            out[size++] = (uint8_t)(gap | 128);
        }
        out[size++] = (uint8_t)gap;
    }
    return size;
}

/* Memory copied and summed in one pass, by the processor's carry-less products. trajrec/lane.c declares what is here. */

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define FOLD __attribute__((target("pclmul,sse4.1")))
#define WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1")))

enum { AHEAD = 4096 }; /* bytes from what is read to what is asked for: the processor itself stops at the end of a page */

int can_fold(void) { return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1"); }
static int can_fold_wide(void) { return __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f"); }

/* What is left to be summed, and copied where there is a place. */
typedef struct {
    char *to;
    const char *from;
    size_t size;
} Span;

static inline void advance(Span *span, size_t size) {
    span->to = span->to ? span->to + size : NULL;
    span->from += size, span->size -= size;
}

/* Stores go past the caches: a row is not looked at again by this thread, and would only push out what the next step
   needs. */
static inline __m128i take_16(Span *span) {
    __m128i bytes = _mm_loadu_si128((const __m128i *)span->from);
    if (span->to) _mm_stream_si128((__m128i *)span->to, bytes);
    advance(span, 16);
    return bytes;
}

WIDE static inline __m512i take_64(Span *span) {
    __m512i bytes = _mm512_loadu_si512(span->from);
    if (span->to) _mm512_stream_si512((void *)span->to, bytes);
    advance(span, 64);
    return bytes;
}

/* Moves 128 bits on by a distance, modulo the polynomial, and adds them to what is there. The distances and the constants
   that stand for them, of the reflected CRC-32: Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
   Instruction, Intel 2009. */
FOLD static inline __m128i fold(__m128i x, __m128i by, __m128i there) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), there);
}

WIDE static inline __m512i fold_four(__m512i x, __m128i distance, __m512i there) {
    __m512i by = _mm512_broadcast_i32x4(distance);
    __m512i low = _mm512_clmulepi64_epi128(x, by, 0x00), high = _mm512_clmulepi64_epi128(x, by, 0x11);
    return _mm512_xor_si512(_mm512_xor_si512(low, high), there);
}

#define BY_16_BYTES _mm_set_epi64x(0x0ccaa009e, 0x1751997d0)
#define BY_64_BYTES _mm_set_epi64x(0x1c6e41596, 0x154442bd4)
#define BY_128_BYTES _mm_set_epi64x(0x14a7fe880, 0x1e88ef372)

FOLD static inline __m128i fold_into_one(const __m128i x[4]) {
    __m128i sum = x[0];
    for (int k = 1; k < 4; k++) sum = fold(sum, BY_16_BYTES, x[k]);
    return sum;
}

/* Takes 64 bytes and all multiples of it. */
FOLD static __m128i fold_lines(Span *all, __m128i sum) {
    Span span = *all;
    __m128i x[4];
    for (int k = 0; k < 4; k++) x[k] = take_16(&span);
    x[0] = fold(sum, BY_16_BYTES, x[0]);
    while (span.size >= 64) {
        _mm_prefetch(span.from + AHEAD, _MM_HINT_T0);
        for (int k = 0; k < 4; k++) x[k] = fold(x[k], BY_64_BYTES, take_16(&span));
    }
    *all = span;
    return fold_into_one(x);
}

/* Takes 128 bytes and all multiples of it; `to` is a multiple of 64. */
WIDE static __m128i fold_wide(Span *all, __m128i sum) {
    Span span = *all;
    __m512i x = take_64(&span), y = take_64(&span);
    x = _mm512_xor_si512(x, _mm512_zextsi128_si512(fold(sum, BY_16_BYTES, _mm_setzero_si128())));
    while (span.size >= 128) {
        for (int k = 0; k < 128; k += 64) _mm_prefetch(span.from + AHEAD + k, _MM_HINT_T0);
        x = fold_four(x, BY_128_BYTES, take_64(&span));
        y = fold_four(y, BY_128_BYTES, take_64(&span));
    }
    *all = span;
    __m128i parts[4];
    _mm512_storeu_si512(parts, fold_four(x, BY_64_BYTES, y));
    return fold_into_one(parts);
}

/* The register of a CRC-32 (zlib's, before its last inversion) after some bytes more, bit by bit. */
static uint32_t register_after(uint32_t r, const unsigned char *data, size_t size) {
    for (; size; data++, size--) {
        r ^= *data;
        for (int k = 0; k < 8; k++) r = r >> 1 ^ (0xEDB88320u & -(r & 1));
    }
    return r;
}

/* The same of bytes that are copied; the copy is what is summed. */
static uint32_t take_few(Span *span, size_t size, uint32_t r) {
    unsigned char bytes[16];
    memcpy(bytes, span->from, size);
    if (span->to) memcpy(span->to, bytes, size);
    advance(span, size);
    return register_after(r, bytes, size);
}

/* Copies and sums what it copies in one go, so that the sum is that of the copy also where another thread changes the
   source. Without a place to copy to it only sums. */
FOLD uint32_t copy_folding(char *to, const char *from, size_t size, uint32_t crc) {
    Span span = {to, from, size};
    size_t head = -(uintptr_t)to & 15;
    uint32_t r = take_few(&span, head < size ? head : size, ~crc);
    if (span.size >= 16) {
        __m128i sum = _mm_xor_si128(take_16(&span), _mm_cvtsi32_si128((int)r));
        while (span.size >= 16 && (uintptr_t)span.to & 63) sum = fold(sum, BY_16_BYTES, take_16(&span));
        if (span.size >= 128 && can_fold_wide()) sum = fold_wide(&span, sum);
        if (span.size >= 64) sum = fold_lines(&span, sum);
        while (span.size >= 16) sum = fold(sum, BY_16_BYTES, take_16(&span));
        unsigned char folded[16];
        _mm_storeu_si128((__m128i *)folded, sum);
        r = register_after(0, folded, 16);
    }
    return ~take_few(&span, span.size, r);
}

/* What was stored past the caches has arrived. */
void await_stores(void) {
    _mm_sfence();
    atomic_thread_fence(memory_order_release);
}
#else
void await_stores(void) { atomic_thread_fence(memory_order_release); }
int can_fold(void) { return 0; }
uint32_t copy_folding(char *to, const char *from, size_t size, uint32_t crc) { return 0; }
#endif

"""A few kernels for decoding on a CPU, compiled on first use, for what torch does in many small operations.

Design choices:
- With a handful of rows a layer's time goes into dispatching some thirty tiny operations, and into attention over half
  precision keys, which torch converts or handles slowly. Here that is four calls: norm, rotation, value embedding,
  attention.
- The fifth is the matrix product. It reads a weight once, as one stream, for up to twelve rows (more rows reuse it from
  a core's cache), and starts in a microsecond.
- One C++ source without torch's headers: it compiles in seconds, is kept in the user's cache folder and is called with
  plain pointers. Without a compiler, or with STAGEWISE_NATIVE=0, `kernels()` is None and torch's operations are used.
- Every output row is computed alone and in one order, so it has the same bits however many rows are computed with it.
- Accumulation is in fp32; results are rounded where torch's operations would round.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("stagewise")

WIDE = 32  # outputs of a block in the layout of weights
MOST_ROWS = 64  # rows (batch x positions) up to which these kernels are meant to be used

SOURCE = r"""
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif
struct half_t { uint16_t bits; };
static inline float up(float x) { return x; }
static inline float up(half_t x) { uint32_t u = (uint32_t)x.bits << 16; float f; memcpy(&f, &u, 4); return f; }
static inline void put(float& y, float x) { y = x; }
static inline void put(half_t& y, float x) {
  uint32_t u; memcpy(&u, &x, 4);
  uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  y.bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded;
}
template <class T> static inline float rounded(float x) { T t; put(t, x); return up(t); }
static const int LANES = 32;
template <class A, class B> static inline float dot(const A* a, const B* b, long n) {
  float lane[LANES] = {0};
  long k = 0;
  for (; k + LANES <= n; k += LANES)
    for (int j = 0; j < LANES; j++) lane[j] += up(a[k + j]) * up(b[k + j]);
  for (int width = LANES / 2; width; width /= 2)
    for (int j = 0; j < width; j++) lane[j] += lane[j + width];
  for (; k < n; k++) lane[0] += up(a[k]) * up(b[k]);
  return lane[0];
}
static inline float exponential(float x) {  // x <= 0
  x = x < -87.f ? -87.f : x;
  float n = std::nearbyint(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f; p = p * r + 8.3334519073e-3f; p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f; p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  int32_t e = ((int32_t)n + 127) << 23; float s; memcpy(&s, &e, 4);
  return p * s;
}
template <class T> static void norm(const T* x, T* y, long rows, long size, float eps) {
  for (long i = 0; i < rows; i++, x += size, y += size) {
    float scale = 1.f / std::sqrt(dot(x, x, size) / size + eps);
    for (long j = 0; j < size; j++) put(y[j], up(x[j]) * scale);
  }
}
// x: tokens of `heads` heads of d numbers, `stride` apart; cos, sin: d numbers per token
template <class T> static void rotate_norm(const T* x, const T* cos, const T* sin, T* y, long tokens, long stride,
                                           long heads, long d, long period, float eps) {
  std::vector<float> z(d);
  for (long t = 0; t < tokens; t++) {
    const T *c = cos + (t % period) * d, *s = sin + (t % period) * d;
    for (long h = 0; h < heads; h++) {
      const T* a = x + t * stride + h * d;
      for (long j = 0, o = d / 2; j < d; j++, o = o + 1 == d ? 0 : o + 1)
        z[j] = rounded<T>(rounded<T>(up(a[j]) * up(c[j])) + up(a[o]) * up(s[j]));
      float scale = 1.f / std::sqrt(dot(z.data(), z.data(), d) / d + eps);
      for (long j = 0; j < d; j++) put(*y++, z[j] * scale);
    }
  }
}
// y = v + scale * sigmoid(gate x[:channels]) * table[ids], per group of d numbers
template <class T> static void gate_values(const T* v, long stride, const T* x, long size, const T* gate, long channels,
                                           float scale, const T* table, const long* ids, T* y, long tokens, long groups,
                                           long d) {
  for (long t = 0; t < tokens; t++)
    for (long g = 0; g < groups; g++) {
      float z = 0;
      for (long j = 0; j < channels; j++) z += up(x[t * size + j]) * up(gate[g * channels + j]);
      z = rounded<T>(scale * rounded<T>(1.f / (1.f + std::exp(-rounded<T>(z)))));
      const T *a = v + t * stride + g * d, *e = table + (ids[t] * groups + g) * d;
      for (long j = 0; j < d; j++) put(*y++, up(a[j]) + z * up(e[j]));
    }
}
// new keys and values go to slots start[b] + t; query t sees slots start[b] + t - window .. start[b] + t
template <class T> static void attend(const T* q, const T* k, const T* v, const long* st, T* keys, T* values, T* y,
                                      const long* start, long rows, long length, long heads, long groups, long d,
                                      long capacity, long window, float scale) {
  // st: strides of q, k, v in (row, head, token)
  for (long b = 0; b < rows; b++)
    for (long g = 0; g < groups; g++)
      for (long t = 0; t < length; t++) {
        long at = ((b * groups + g) * capacity + start[b] + t) * d;
        memcpy(keys + at, k + b * st[3] + g * st[4] + t * st[5], d * sizeof(T));
        memcpy(values + at, v + b * st[6] + g * st[7] + t * st[8], d * sizeof(T));
      }
  long work = rows * heads * length;
  #pragma omp parallel for schedule(static) if (work * (start[0] + length) * d > 65536)
  for (long i = 0; i < work; i++) {
    long b = i / (heads * length), h = i / length % heads, t = i % length, g = h / (heads / groups);
    long stop = start[b] + t + 1, first = stop - 1 - window > 0 ? stop - 1 - window : 0, n = stop - first;
    long at = ((b * groups + g) * capacity + first) * d;
    const T *kk = keys + at, *vv = values + at;
    std::vector<float> p(n + LANES), query(d), out(d, 0.f);
    for (long j = 0; j < d; j++) query[j] = up(q[b * st[0] + h * st[1] + t * st[2] + j]) * scale;
    float top = -INFINITY, total = 0;
    for (long s = 0; s < n; s++) { p[s] = dot(query.data(), kk + s * d, d); top = p[s] > top ? p[s] : top; }
    for (long s = 0; s < n; s++) p[s] = exponential(p[s] - top);
    for (long s = 0; s < n; s++) total += p[s];
    for (long s = 0; s < n; s++) { float w = p[s]; for (long j = 0; j < d; j++) out[j] += w * up(vv[s * d + j]); }
    T* to = y + ((b * length + t) * heads + h) * d;
    for (long j = 0; j < d; j++) put(to[j], out[j] / total);
  }
}
// Products. w: blocks of 32 outputs; in a block all inputs in order, fp32 [in][32], bf16 [in / 2][32][2].
static const int WIDE = 32, TOGETHER = 12;  // outputs of a block; rows whose sums fit in registers beside its weights
typedef float v16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
static inline v16 as_float(u16 u) { v16 v; memcpy(&v, &u, 64); return v; }
static inline void accumulate(v16& sum, v16 w, const float* x) { sum += w * *x; }
static inline void accumulate(v16& sum, u16 w, const half_t* x) {
#ifdef __AVX512BF16__
  uint32_t pair; memcpy(&pair, x, 4);
  sum = _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
#else
  sum += as_float(w << 16) * up(x[0]);
  sum += as_float(w & 0xffff0000u) * up(x[1]);
#endif
}
template <class T> struct Step { typedef v16 vector; static const int inputs = 1; };
template <> struct Step<half_t> { typedef u16 vector; static const int inputs = 2; };
// adds the products of inputs [from, to) to `rows` rows of sums; M is `rows`, known to the compiler
template <class T, int M>
static void block(int rows, const T* x, const T* w, float* sums, long in, long from, long to) {
  if constexpr (M > 1) if (rows < M) return block<T, M - 1>(rows, x, w, sums, in, from, to);
  v16 sum[M][2];
  #pragma GCC unroll 12
  for (int m = 0; m < M; m++) { memcpy(&sum[m][0], sums + WIDE * m, 64); memcpy(&sum[m][1], sums + WIDE * m + 16, 64); }
  for (long k = from; k < to; k += Step<T>::inputs) {
    typename Step<T>::vector a, b;
    memcpy(&a, (const char*)(w + WIDE * k), 64);
    memcpy(&b, (const char*)(w + WIDE * k) + 64, 64);
    #pragma GCC unroll 12
    for (int m = 0; m < M; m++) { accumulate(sum[m][0], a, x + m * in + k); accumulate(sum[m][1], b, x + m * in + k); }
  }
  #pragma GCC unroll 12
  for (int m = 0; m < M; m++) {
    v16 a = sum[m][0], b = sum[m][1];  // copies keep the sums themselves in registers
    memcpy(sums + WIDE * m, &a, 64); memcpy(sums + WIDE * m + 16, &b, 64);
  }
}
template <class T> static void linear(const T* x, const T* w, T* y, long rows, long in, long out) {
  const long MOST = 4 * TOGETHER;  // rows whose sums are kept at a time
  #pragma omp parallel for schedule(static) if (in * out * rows > 65536)
  for (long o = 0; o < out; o += WIDE) {
    float sums[MOST * WIDE];
    for (long first = 0; first < rows; first += MOST) {
      long n = rows - first < MOST ? rows - first : MOST, count = out - o < WIDE ? out - o : WIDE;
      memset(sums, 0, n * WIDE * sizeof(float));
      // more rows take turns, in equal groups, on a piece of the weight that stays in the first cache
      long groups = (n + TOGETHER - 1) / TOGETHER, chunk = groups == 1 ? in : 256;
      for (long k = 0; k < in; k += chunk) {
        long to = k + chunk < in ? k + chunk : in;
        for (long r = 0, step; r < n; r += step) {
          step = (n + groups - 1) / groups;
          step = step < n - r ? step : n - r;
          block<T, TOGETHER>(step, x + (first + r) * in, w + o * in, sums + WIDE * r, in, k, to);
        }
      }
      for (long r = 0; r < n; r++)
        for (long j = 0; j < count; j++) put(y[(first + r) * out + o + j], sums[WIDE * r + j]);
    }
  }
}
#define EXPORT(T, S) extern "C" { \
  void norm_##S(const T* x, T* y, long rows, long size, float eps) { norm(x, y, rows, size, eps); } \
  void rotate_norm_##S(const T* x, const T* c, const T* s, T* y, long tokens, long stride, long heads, long d, \
                       long period, float eps) { rotate_norm(x, c, s, y, tokens, stride, heads, d, period, eps); } \
  void gate_values_##S(const T* v, long stride, const T* x, long size, const T* gate, long channels, float scale, \
                       const T* table, const long* ids, T* y, long tokens, long groups, long d) { \
    gate_values(v, stride, x, size, gate, channels, scale, table, ids, y, tokens, groups, d); } \
  void attend_##S(const T* q, const T* k, const T* v, const long* st, T* keys, T* values, T* y, const long* start, \
                  long rows, long length, long heads, long groups, long d, long capacity, long window, float scale) { \
    attend(q, k, v, st, keys, values, y, start, rows, length, heads, groups, d, capacity, window, scale); } \
  void linear_##S(const T* x, const T* w, T* y, long rows, long in, long out) { linear(x, w, y, rows, in, out); } }
EXPORT(float, f)
EXPORT(half_t, b)
#if defined(__AVX512BF16__)
extern "C" int bf16_products() { return 1; }
#else
extern "C" int bf16_products() { return 0; }
#endif
"""
FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


def compile_source() -> Path:
    """The shared library, from the user's cache folder or compiled into it. Raises OSError or CalledProcessError."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise OSError("no C++ compiler found")
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    tag = hashlib.sha256("\0".join([SOURCE, compiler, *FLAGS, platform.machine(), flags]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagewise"
    library = folder / f"kernels-{tag}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source, compiled, linked = (Path(work) / name for name in ("kernels.cpp", "kernels.o", "kernels.so"))
        source.write_text(SOURCE, encoding="utf-8")
        # linked without an OpenMP runtime: torch's own is already in the process, and two would fight for the cores
        for command in (
            [compiler, *FLAGS, "-c", str(source), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        os.replace(linked, library)
    return library


class Kernels:
    """The compiled kernels. All take and return contiguous CPU tensors of one dtype, fp32 or bf16, unless said."""

    def __init__(self, library: Path):
        lib = ctypes.CDLL(str(library))
        self.bf16_products = bool(lib.bf16_products())  # the processor multiplies bf16 directly
        p, n, f = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        signatures = {
            "norm": [p, p, n, n, f],
            "rotate_norm": [p, p, p, p, n, n, n, n, n, f],
            "gate_values": [p, n, p, n, p, n, f, p, p, p, n, n, n],
            "attend": [p, p, p, p, p, p, p, p, n, n, n, n, n, n, n, f],
            "linear": [p, p, p, n, n, n],
        }
        self.functions: dict[str, dict] = {}
        for name, arguments in signatures.items():
            self.functions[name] = {}
            for dtype, suffix in ((torch.float32, "f"), (torch.bfloat16, "b")):
                function = getattr(lib, f"{name}_{suffix}")
                function.argtypes, function.restype = arguments, None
                self.functions[name][dtype] = function
        self._norm, self._rotate_norm, self._gate, self._attend, self._linear = (
            self.functions[name] for name in signatures
        )

    def norm(self, x: Tensor, eps: float) -> Tensor:
        """RMS norm over the last dimension."""
        x = x.contiguous()
        y, size = torch.empty_like(x), x.size(-1)
        self._norm[x.dtype](x.data_ptr(), y.data_ptr(), x.numel() // size, size, eps)
        return y

    def rotate_norm(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """Rotated and then normed heads (B, T, H, d); x may be a slice of a (B, T, -1) product."""
        rows, length, heads, d = x.shape
        y = x.new_empty(rows, length, heads, d)
        self._rotate_norm[x.dtype](
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            y.data_ptr(),
            rows * length,
            x.stride(1),
            heads,
            d,
            cos.numel() // d,
            eps,
        )
        return y

    def gate_values(self, v: Tensor, x: Tensor, gate: Tensor, scale: float, table: Tensor, ids: Tensor) -> Tensor:
        """`v + scale * sigmoid(gate x[:channels]) * table[ids]` (B, T, G, d); v may be a slice of a product."""
        rows, length, groups, d = v.shape
        y = v.new_empty(rows, length, groups, d)
        self._gate[v.dtype](
            v.data_ptr(),
            v.stride(1),
            x.data_ptr(),
            x.size(-1),
            gate.data_ptr(),
            gate.size(1),
            scale,
            table.data_ptr(),
            ids.data_ptr(),
            y.data_ptr(),
            rows * length,
            groups,
            d,
        )
        return y

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, start: Tensor, window: int, scale: float
    ) -> Tensor:
        """Store new keys and values, then attend over what each query sees.

        Args:
            q: (B, H, T, d), k and v: (B, G, T, d), any strides but a dense last dimension.
            keys, values: (B, G, capacity, d), written at slots start .. start + T - 1. start: (B,) int64.
            window: query t sees the slots start + t - window .. start + t that exist.
        Returns (B, H, T, d), a view of (B, T, H, d).
        """
        rows, heads, length, d = q.shape
        y = q.new_empty(rows, length, heads, d)
        strides = (ctypes.c_long * 9)(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        self._attend[q.dtype](
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            strides,
            keys.data_ptr(),
            values.data_ptr(),
            y.data_ptr(),
            start.data_ptr(),
            rows,
            length,
            heads,
            k.size(1),
            d,
            keys.size(2),
            window,
            scale,
        )
        return y.transpose(1, 2)

    def linear(self, x: Tensor, weight: Tensor, out: int) -> Tensor:
        """x (..., in) times a matrix (out, in) given in `blocked` form: (..., out)."""
        y, size = x.new_empty(*x.shape[:-1], out), weight.size(1) * weight.size(3)
        x = (x if x.size(-1) == size else F.pad(x, (0, size - x.size(-1)))).contiguous()
        self._linear[x.dtype](x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // size, size, out)
        return y


def blocked(weight: Tensor) -> Tensor:
    """A matrix (out, in) in the order `Kernels.linear` reads it, padded with zeros.

    fp32: (ceil(out / 32), in, 32, 1). bf16, which is multiplied in pairs: (ceil(out / 32), ceil(in / 2), 32, 2).
    """
    out, size = weight.shape
    inputs = 2 if weight.dtype == torch.bfloat16 else 1
    padded = F.pad(weight, (0, -size % inputs, 0, -out % WIDE))
    return padded.view(padded.size(0) // WIDE, WIDE, -1, inputs).transpose(1, 2).contiguous()


def unblocked(weight: Tensor, shape: torch.Size) -> Tensor:
    """The matrix of `shape` (out, in) that `blocked` was given."""
    return weight.transpose(1, 2).reshape(weight.size(0) * WIDE, -1)[: shape[0], : shape[1]].contiguous()


@cache
def kernels() -> Kernels | None:
    """The compiled kernels, or None where they cannot be had."""
    if os.environ.get("STAGEWISE_NATIVE") == "0" or platform.system() != "Linux":
        return None
    try:
        return Kernels(compile_source())
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("decoding goes on without compiled kernels: %s", error)
        return None

// Just enough of CUDA to run the decoding kernel (integration/lora_patch/decode*.cu) on a CPU, for tests.
//
// A thread of the GPU is a fiber of one thread here. A warp's fibers meet in shuffles, ballots and tensor products, a
// block's in __syncthreads; who waits for another block polls memory, and a poll lets others run. Which warp runs next
// is drawn from a seed: mostly one warp runs until it can no more, and now and then another overtakes, so that a warp
// may be very late or very early (Burckhardt et al., "A randomized scheduler with probabilistic guarantees of finding
// bugs", 2010). A copy into shared memory spoils its target at once; a bulk copy arrives at some later time, another
// when it is waited for. Where nothing can run any more, or fibers of a warp meet in different places, the run ends
// with a message.
// Memory is as one thread sees it: missing fences and stale caches are not found.
#pragma once

#define _XOPEN_SOURCE 600
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#define __host__
#define __device__
#define __forceinline__ inline

using std::max;
using std::min;

struct uint2 { unsigned x, y; };
struct alignas(8) uint4 { unsigned x, y, z, w; };  // MLX's arrays begin at multiples of 8 on a CPU
struct float2 { float x, y; };
struct alignas(8) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
inline To bits(From v) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &v, sizeof(To));
  return to;
}
inline int __float_as_int(float v) { return bits<int>(v); }
inline float __int_as_float(int v) { return bits<float>(v); }
inline float __uint_as_float(unsigned v) { return bits<float>(v); }

struct __nv_bfloat16 { uint16_t v; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float __bfloat162float(__nv_bfloat16 v) { return bits<float>((unsigned)v.v << 16); }
inline __nv_bfloat16 __float2bfloat16(float v) {  // to nearest, ties to even
  const unsigned u = bits<unsigned>(v);
  return {(uint16_t)(v != v ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16(a), __float2bfloat16(b)}; }

template <class Action>
inline __nv_bfloat162 each(Action action) { return {__float2bfloat16(action(&__nv_bfloat162::x)), __float2bfloat16(action(&__nv_bfloat162::y))}; }
inline __nv_bfloat162 __hsub2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return each([&](auto half) { return __bfloat162float(a.*half) - __bfloat162float(b.*half); });
}
inline __nv_bfloat162 __hmul2(__nv_bfloat162 a, __nv_bfloat162 b) {
  return each([&](auto half) { return __bfloat162float(a.*half) * __bfloat162float(b.*half); });
}
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) {
  return each([&](auto half) { return std::fma(__bfloat162float(a.*half), __bfloat162float(b.*half), __bfloat162float(c.*half)); });
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline long long __float2ll_rn(float v) { return std::llrint(v); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned of) {
  const uint64_t both = (uint64_t)b << 32 | a;
  unsigned found = 0;
  for (int i = 0; i < 4; i++) found |= (unsigned)(both >> (of >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  return found;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }

// -- fibers -----------------------------------------------------------------------------------------------------------

namespace cpu {

constexpr int LANES = 32, STACK = 64 << 10, GUARD = 4096;
constexpr unsigned char SPOILT = 0xff;  // of bfloat16 and float: not a number

enum Meeting { NOWHERE, WARP, SHUFFLE, BALLOT, PRODUCT };

struct Products { float d[4]; unsigned a[4], b[2]; };

struct Warp;
struct Copy { char* to; const char* from; unsigned size; Warp* warp; uint64_t* bar; };
struct Fiber {
  jmp_buf at;
  char* stack;
  Warp* warp;
  int lane, thread;
  bool waits, done;
  uint64_t* bar;             // whose copies it waits for
  std::vector<Copy> copies;  // its own, of 16 bytes
};
struct Block {
  char* shared;
  int index, arrived;
};
struct Warp {
  Fiber fibers[LANES];
  Block* block;
  Meeting meeting;
  int arrived, able;  // fibers that have come to the meeting; that could run
  unsigned priority;
  uint32_t given[LANES], taken[LANES];
  Products products[LANES];
};

struct Machine {
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  std::vector<Copy> copies;  // that are under way to barriers
  int block_size = 0;
  uint64_t state = 0;
  unsigned lowest = 0;  // priority of the warp that has polled last
  long idle = 0;        // polls since anything happened
  Fiber* now = nullptr;
  jmp_buf scheduler;
  ucontext_t boot, made;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  char fault[256] = "";
};
static Machine m;

inline unsigned draw(unsigned below) {  // xorshift64*
  m.state ^= m.state >> 12, m.state ^= m.state << 25, m.state ^= m.state >> 27;
  return (unsigned)((m.state * 0x2545F4914F6CDD1Dull) >> 33) % below;
}
constexpr unsigned HIGH = 1u << 30;  // priorities above are drawn, those below are of warps that have polled
inline unsigned any_priority() { return HIGH + draw(HIGH); }

__attribute__((noinline)) void to_scheduler() {
  if (!_setjmp(m.now->at)) _longjmp(m.scheduler, 1);
}
[[noreturn]] __attribute__((noinline)) void fail(const char* what) {
  snprintf(m.fault, sizeof m.fault, "block %d, thread %d: %s", m.now->warp->block->index, m.now->thread, what);
  _longjmp(m.scheduler, 1);
}
inline void wait_here() {
  m.now->waits = true, m.now->warp->able--;
  to_scheduler();
}
inline void wake(Fiber& fiber) {
  if (fiber.waits) fiber.waits = false, fiber.warp->able++;
}
__attribute__((noinline)) void poll() {
  m.idle++;
  m.now->warp->priority = --m.lowest;
  to_scheduler();
  m.now->warp->priority = any_priority();
}

// Wait for the other lanes of the warp; the last one does what is to be done for all.
template <class Action>
inline void meet(Meeting where, Action action) {
  Warp& warp = *m.now->warp;
  if (warp.arrived && warp.meeting != where) fail("the lanes of a warp wait in different places");
  warp.meeting = where;
  if (++warp.arrived < LANES) return wait_here();
  action(warp);
  warp.arrived = 0, m.idle = 0;
  for (Fiber& fiber : warp.fibers) wake(fiber);
}

__attribute__((noinline)) void multiply(Warp& warp) {
  float a[16][16], b[16][8];
  bool low = false;  // whether rows 8 to 15 hold anything
  for (int lane = 0; lane < LANES; lane++) {
    const Products& p = warp.products[lane];
    const int g = lane / 4, t = lane % 4;
    low |= p.a[1] || p.a[3];
    for (int i = 0; i < 2; i++) {
      for (int j = 0; j < 4; j++)
        a[g + j % 2 * 8][2 * t + j / 2 * 8 + i] = bits<float>(i ? p.a[j] & 0xffff0000u : p.a[j] << 16);
      for (int j = 0; j < 2; j++) b[2 * t + 8 * j + i][g] = bits<float>(i ? p.b[j] & 0xffff0000u : p.b[j] << 16);
    }
  }
  for (int r = 0; r < (low ? 16 : 8); r++) {
    float sum[8] = {};
    for (int k = 0; k < 16; k++)
      for (int c = 0; c < 8; c++) sum[c] += a[r][k] * b[k][c];
    for (int c = 0; c < 8; c++) warp.products[r % 8 * 4 + c / 2].d[r / 8 * 2 + c % 2] += sum[c];
  }
}

inline void arrive_at(uint64_t* bar, int arrivals, int size) {  // low half: bytes; then arrivals to come, all, phase
  int32_t* bytes = reinterpret_cast<int32_t*>(bar);
  uint8_t* counts = reinterpret_cast<uint8_t*>(bytes + 1);
  *bytes += size, counts[0] -= arrivals;
  if (*bytes == 0 && counts[0] == 0) counts[0] = counts[1], counts[2] ^= 1;
}
inline char* shared(unsigned at, unsigned size) {
  if (at < GUARD || at + size > GUARD + m.block_size) fail("outside of shared memory");
  return m.now->warp->block->shared + at;
}
inline void finish(size_t at) {
  const Copy copy = m.copies[at];
  m.copies[at] = m.copies.back();
  m.copies.pop_back();
  memcpy(copy.to, copy.from, copy.size);
  m.idle = 0;
  arrive_at(copy.bar, 0, -(int)copy.size);
  for (Fiber& fiber : copy.warp->fibers)
    if (fiber.bar == copy.bar) wake(fiber);
}
inline void start_copy(unsigned to, const void* from, unsigned size, uint64_t* bar) {
  if (to % 16 || size % 16) fail("a copy that is not aligned");
  char* target = shared(to, size);
  memset(target, SPOILT, size);
  (bar ? m.copies : m.now->copies).push_back({target, (const char*)from, size, m.now->warp, bar});
}

void entry() {
  if (!_setjmp(m.now->at)) setcontext(&m.boot);
  m.body(m.arguments);
  m.now->done = true;
  wait_here();
}

// Run one fiber of a warp after another, in an order that is drawn, until each waits.
inline void run_warp(Warp& warp) {
  const int start = draw(LANES), step = draw(2) ? 1 : LANES - 1;
  for (int i = 0, lane = start; i < LANES && !m.fault[0]; i++, lane = (lane + step) % LANES) {
    if (warp.fibers[lane].waits) continue;
    m.now = &warp.fibers[lane];
    if (!_setjmp(m.scheduler)) _longjmp(m.now->at, 1);
  }
}

// Run a grid. Returns whether all went well; `m.fault` says what did not.
inline bool run(void (*body)(void*), void* arguments, int blocks, int threads, int shared_size, uint64_t seed) {
  m.body = body, m.arguments = arguments, m.block_size = shared_size;
  m.state = seed * 0x9E3779B97F4A7C15ull + 1, m.lowest = HIGH, m.idle = 0, m.fault[0] = 0;
  m.copies.clear();
  const int count = blocks * threads / LANES;
  if ((int)m.warps.size() != count) {  // once a library
    m.warps = std::vector<Warp>(count);
    m.blocks = std::vector<Block>(blocks);
    char* stack = (char*)mmap(nullptr, (size_t)count * LANES * STACK, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (Block& block : m.blocks) block.shared = new char[shared_size + 2 * GUARD];
    for (Warp& warp : m.warps)
      for (Fiber& fiber : warp.fibers) fiber.stack = stack, stack += STACK;
  }
  for (int b = 0; b < blocks; b++) {
    m.blocks[b].index = b, m.blocks[b].arrived = 0;
    memset(m.blocks[b].shared, SPOILT, shared_size + 2 * GUARD);
  }
  for (int w = 0; w < count; w++) {
    Warp& warp = m.warps[w];
    warp.block = &m.blocks[w * LANES / threads], warp.arrived = 0, warp.able = LANES, warp.priority = any_priority();
    for (int lane = 0; lane < LANES; lane++) {
      Fiber& fiber = warp.fibers[lane];
      fiber.warp = &warp, fiber.lane = lane, fiber.thread = w * LANES % threads + lane;
      fiber.waits = fiber.done = false, fiber.bar = nullptr, fiber.copies.clear();
      getcontext(&m.made);
      m.made.uc_stack.ss_sp = fiber.stack, m.made.uc_stack.ss_size = STACK, m.made.uc_link = nullptr;
      makecontext(&m.made, entry, 0);
      m.now = &fiber;
      swapcontext(&m.boot, &m.made);
    }
  }
  while (!m.fault[0]) {
    Warp* next = nullptr;
    for (Warp& warp : m.warps)
      if (warp.able && (!next || warp.priority > next->priority)) next = &warp;
    if (!m.copies.empty() && (!next || next->priority < HIGH || !draw(8))) {
      finish(draw(m.copies.size()));
      continue;
    }
    if (!next) {
      for (Warp& warp : m.warps)
        for (Fiber& fiber : warp.fibers)
          if (!fiber.done && !m.fault[0])
            snprintf(m.fault, sizeof m.fault, "block %d, thread %d: waits for ever", warp.block->index, fiber.thread);
      break;
    }
    run_warp(*next);
    if (!draw(256)) m.warps[draw(count)].priority = any_priority();
    if (m.idle > 1000 * count && !m.fault[0]) snprintf(m.fault, sizeof m.fault, "all poll for ever");
  }
  for (Block& block : m.blocks)
    for (int i = 0; i < 2 * GUARD && !m.fault[0]; i++)
      if ((unsigned char)block.shared[i < GUARD ? i : i + shared_size] != SPOILT)
        snprintf(m.fault, sizeof m.fault, "block %d: wrote outside of shared memory", block.index);
  return !m.fault[0];
}

}  // namespace cpu

// -- what CUDA C++ names ----------------------------------------------------------------------------------------------

struct Thread { int x; };
#define threadIdx (Thread{cpu::m.now->thread})
#define blockIdx (Thread{cpu::m.now->warp->block->index})
#define gridDim (Thread{(int)cpu::m.blocks.size()})

inline void __syncwarp() { cpu::meet(cpu::WARP, [](cpu::Warp&) {}); }
inline void __syncthreads() {
  cpu::Block& block = *cpu::m.now->warp->block;
  if (cpu::m.now->warp->arrived) cpu::fail("lanes of a warp wait for the block, others for the warp");
  const int threads = cpu::m.warps.size() * cpu::LANES / cpu::m.blocks.size();
  if (++block.arrived < threads) return cpu::wait_here();
  block.arrived = 0, cpu::m.idle = 0;
  for (cpu::Warp& warp : cpu::m.warps)
    if (warp.block == &block)
      for (cpu::Fiber& fiber : warp.fibers)
        if (!fiber.done) cpu::wake(fiber);
}
inline unsigned __ballot_sync(unsigned, bool v) {
  cpu::Fiber& me = *cpu::m.now;
  me.warp->given[me.lane] = v;
  cpu::meet(cpu::BALLOT, [](cpu::Warp& warp) {
    unsigned all = 0;
    for (int i = 0; i < cpu::LANES; i++) all |= warp.given[i] << i;
    for (unsigned& one : warp.taken) one = all;
  });
  return me.warp->taken[me.lane];
}
template <class T>
inline T __shfl_xor_sync(unsigned, T v, int mask) {
  cpu::Fiber& me = *cpu::m.now;
  me.warp->given[me.lane] = bits<unsigned>(v);
  cpu::meet(cpu::SHUFFLE, [](cpu::Warp& warp) { memcpy(warp.taken, warp.given, sizeof warp.taken); });
  return bits<T>(me.warp->taken[me.lane ^ mask]);
}
template <class T>
inline T __ldcg(const T* p) { return *p; }
template <class T>
inline void __stcg(T* p, T v) { *p = v; }
[[noreturn]] inline void __trap() { cpu::fail("trap"); }

// -- what decode_ptx.cu defines ---------------------------------------------------------------------------------------

namespace decode {

typedef unsigned int u32;

inline char* shared_memory() { return cpu::m.now->warp->block->shared + cpu::GUARD; }
inline u32 shared_at(const void* p) { return (u32)((const char*)p - cpu::m.now->warp->block->shared); }

inline uint64_t* mbar_at(u32 bar) { return (uint64_t*)cpu::shared(bar, 8); }
inline void mbar_init(u32 bar, u32 arrivals) { *mbar_at(bar) = (uint64_t)arrivals << 32 | (uint64_t)arrivals << 40; }
inline void mbar_init_fence() {}
inline void mbar_arrive_expect(u32 bar, u32 size) { cpu::arrive_at(mbar_at(bar), 1, size); }
inline u32 mbar_try_wait(u32 bar, u32 parity) {
  uint64_t* const at = mbar_at(bar);
  while ((*at >> 48 & 1) == parity) cpu::m.now->bar = at, cpu::wait_here();
  cpu::m.now->bar = nullptr;
  return 1;
}
inline void copy_bulk(u32 to, const void* from, u32 size, u32 bar) { cpu::start_copy(to, from, size, mbar_at(bar)); }
inline void copy_async(u32 to, const void* from) { cpu::start_copy(to, from, 16, nullptr); }
inline void wait_copies() {
  for (const cpu::Copy& copy : cpu::m.now->copies) memcpy(copy.to, copy.from, copy.size);
  cpu::m.now->copies.clear();
}

inline u32 load_acquire(const u32* p) {
  cpu::poll();
  return *(const volatile u32*)p;
}
inline uint4 load_l2(const void* p) { return *(const uint4*)p; }
inline void add_release(void* p, u32 v) { *(u32*)p += v, cpu::m.idle = 0; }
template <u32 MASK>
inline u32 and_or(u32 a, u32 b) { return (a & MASK) | b; }
inline u32 add_acq_rel(u32* p, u32 v) { return add_release(p, v), *p - v; }
inline void add_relaxed(long long* p, long long v) { *p += v, cpu::m.idle = 0; }
inline void prefetch_l2(const void*) {}

inline void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  cpu::Fiber& me = *cpu::m.now;
  cpu::Products& own = me.warp->products[me.lane];
  own = {{d[0], d[1], d[2], d[3]}, {a0, a1, a2, a3}, {b0, b1}};
  cpu::meet(cpu::PRODUCT, cpu::multiply);
  memcpy(d, own.d, sizeof d);
}
inline void load_transposed(u32& b0, u32& b1, u32 row) {
  cpu::Fiber& me = *cpu::m.now;
  me.warp->given[me.lane] = row;
  cpu::meet(cpu::SHUFFLE, [](cpu::Warp& warp) { memcpy(warp.taken, warp.given, sizeof warp.taken); });
  u32* found[2] = {&b0, &b1};
  for (int i = 0; i < 2; i++) {
    *found[i] = 0;
    for (int j = 0; j < 2; j++)
      *found[i] |= *(const uint16_t*)(cpu::shared(me.warp->taken[8 * i + me.lane % 4 * 2 + j], 16) + me.lane / 4 * 2) << 16 * j;
  }
}
inline void forget(int&, int&, int&, int&) {}

}  // namespace decode

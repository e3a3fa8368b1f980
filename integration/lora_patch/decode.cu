// One decoding step of a Qwen3 language model as one persistent kernel: all layers, the output head and the argmax.
//
// A grid of one block a multiprocessor walks through the phases of a layer (qkv | attention | o | gate and up | down);
// a barrier over the grid parts them. Each warp owns a fixed range of every product's inputs and streams its part of
// the weights through a ring of its own in shared memory by bulk copies. The stream does not depend on activations, so
// it runs on while a barrier or attention is waited for: device memory is the only thing that should ever be busy.
// Products run on tensor cores, tokens as the 16 rows of A (8 or 16 used), weights as the 8 columns of B.
// The adapter: whoever finishes some inputs of a product adds what they give to z = A x, before the barrier that
// everyone waits for anyway; B z is one more sum of an output, beside those of the warps. z is summed in integers
// (units of 2^-32), so that it does not depend on the order of the blocks.
// A layer's code should fit into the instruction cache (128 KB on Hopper, 8,000 instructions): what is not in an inner
// loop is not unrolled.
// The Python side (decode_kernel.py) defines the model's dimensions in front of this text: LAYERS, E (hidden), HEADS,
// KV (key-value heads), DIM (of a head), F (intermediate), V (vocabulary), BLOCKS (of the grid), BITS (of a matrix's
// value: 16 or 4), EPS, RANK (0 without an adapter), MB (rows at most: 8 or 16), CHUNKS (of 32 inputs, that a warp
// holds at a time).

namespace decode {

typedef __nv_bfloat16 bf;

constexpr int WARPS = 8, THREADS = 256, SLOTS = BITS == 4 ? 6 : 2, HALVES = MB / 8;
constexpr int QW = HEADS * DIM, KW = KV * DIM, QKV = QW + 2 * KW, GROUP = HEADS / KV;
constexpr int SUB = BITS == 4 ? 160 : 128;  // columns of the cache that a block attends to at a time
constexpr int EARLY = 384;    // columns of it that the L2 cache is asked for in the layer before: 25 MB in all
constexpr int PARTS_OF = 16;  // parts of the cache that a block may have
constexpr float NONE = -3.0e38f;
constexpr float Z_ONE = 4294967296.0f;       // z is held in units of one part of this
constexpr int COPIES = 4, Z_COPY = 16 * 96;  // of z, each added to by some of the blocks: fewer wait for one another

// -- geometry of the phases: 0 qkv, 1 o, 2 gate and up, 3 down, 4 output head -----------------------------------------

__host__ __device__ constexpr int inputs(int p) { return p == 1 ? QW : p == 3 ? F : E; }
__host__ __device__ constexpr int passes(int p) {
  int c = inputs(p) / (32 * WARPS);
  for (int n = 1; n <= c; n++)
    if (c % n == 0 && c / n <= CHUNKS) return n;
  return c;
}
__host__ __device__ constexpr int chunks(int p) { return inputs(p) / (32 * WARPS) / passes(p); }  // of 32 inputs
__host__ __device__ constexpr int tiles(int p) { return p == 1 || p == 3 ? 1 : 2; }               // of 8 rows in a unit
// Bytes of a row in a unit. Of 4 bits: 16 bytes a chunk, then scale and bias of each chunk, padded to an odd number of
// 16 bytes, so that eight rows side by side lie in different banks.
__host__ __device__ constexpr int bytes(int p) {
  return BITS == 4 ? (chunks(p) * 20 + 15) / 16 / 2 * 32 + 16 : chunks(p) * 64;
}
__host__ __device__ constexpr int pitch(int p) {
  return BITS == 4 || bytes(p) % 128 ? bytes(p) : bytes(p) + (RANK ? 32 : 64);
}
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int up_to(int a, int b) { return (a + b - 1) / b * b; }
constexpr int SLOT = larger(larger(pitch(0) * 16, pitch(1) * 8), larger(pitch(2) * 16, pitch(3) * 8));
__host__ __device__ constexpr int low(int p) { return RANK * (p == 0 ? 3 : p == 2 ? 2 : 1); }  // rows of A
__host__ __device__ constexpr int rows(int p) { return p == 0 ? QKV : p == 2 ? 2 * F : E; }
__host__ __device__ constexpr long lora_at(int p) {
  long at = 0;
  for (int i = 0; i < p; i++) at += (long)low(i) * inputs(i) + (long)rows(i) * RANK;
  return at;
}
// Units of 16 rows, times tokens, whose partial sums are held at once.
constexpr int HELD = RANK > 16 || (RANK && MB > 8) ? 64 : 80;
constexpr int OWN_E = (E + BLOCKS - 1) / BLOCKS, OWN_F = (F + BLOCKS - 1) / BLOCKS, OWN = larger(OWN_E, OWN_F),
              OWN_QKV = (QKV + BLOCKS - 1) / BLOCKS;  // values that a block finishes
constexpr int OWN_PITCH = up_to(OWN, 16);
constexpr int NORMS = 2 * E + 2 * DIM;

// -- shared memory ----------------------------------------------------------------------------------------------------

constexpr int Q_PITCH = DIM * 2 + 64, P_PITCH = SUB * 2 + 64, S_PITCH = SUB + 8;
constexpr int ATTENTION = 16 * (Q_PITCH + P_PITCH + S_PITCH * 4) + 192, HEAD_A_PITCH = GROUP * DIM + 8,
              HEAD_A = HEAD_A_PITCH * RANK * 2;
constexpr int SUMS = WARPS + (RANK ? 1 : 0);  // that make an output
constexpr int PARTS = larger(HELD * 2 * SUMS * 8 * 4, ATTENTION);
constexpr bool HEAD_A_FITS = ATTENTION + HEAD_A <= PARTS;  // what a head gives to z of attention's outputs
// what attends is put together where queries, weights and scores lay: of a head of keys, for eight tokens at most
static_assert(8 * GROUP * DIM * 2 <= 16 * (Q_PITCH + P_PITCH) && 8 * GROUP * 32 <= 16 * S_PITCH, "see refusal()");
// of A what the block's values give to z, those values, z, and the block's rows of B
constexpr int A_BYTES = larger(up_to(OWN_E, 16) * larger(low(0), low(2)), up_to(OWN_F, 16) * low(3)) * 2,
              X_BYTES = RANK ? MB * OWN_PITCH * 2 : 0, Z_BYTES = MB * low(0) * 2,
              B_BYTES = larger(OWN_QKV, larger(OWN_E, 2 * OWN_F)) * RANK * 2;
constexpr int AT_PARTS = SLOTS * WARPS * SLOT, AT_A = AT_PARTS + PARTS, AT_X = AT_A + A_BYTES, AT_Z = AT_X + X_BYTES,
              AT_B = AT_Z + Z_BYTES, AT_TURNS = AT_B + B_BYTES, AT_SS = AT_TURNS + MB * DIM / 2 * 4,
              AT_BAR = AT_SS + WARPS * MB * 4, AT_TABLE = AT_BAR + SLOTS * WARPS * 8,
              AT_META = AT_TABLE + (LAYERS * 4 + 1) * 8 + 8, AT_PART = AT_META + 256, AT_MISC = AT_PART + PARTS_OF * 32,
              SHARED = AT_MISC + 80;

// -- scratch in device memory, in bytes -------------------------------------------------------------------------------

constexpr long S_BAR = 0, S_X0 = 4096, S_X1 = S_X0 + 16l * E * 2, S_QKV = S_X1 + 16l * E * 2,
               S_ATT = S_QKV + 16l * QKV * 4, S_ACT = S_ATT + 16l * QW * 2, S_BEST = S_ACT + 16l * F * 2,
               S_ML = S_BEST + 256l * 16 * 8, S_PO = S_ML + (long)KV * 32 * 16 * GROUP * 8,
               S_Z = S_PO + (long)KV * 32 * 16 * GROUP * DIM * 4, S_END = S_Z + 4l * COPIES * Z_COPY * 8;

struct Args {
  const int* tokens;
  const int* meta;    // columns of the cache, sequences of the cache, rows, tokens a sequence, then (sequence, column,
                      // position) a row
  const long* table;  // addresses of the matrices: 4 a layer, head, embedding
  const bf* norms;
  const bf* lora;
  bf* keys;                  // [LAYERS, sequences, KV, columns, DIM]
  bf* values;                // [LAYERS, sequences, KV, DIM, columns]
  const float* frequencies;  // [DIM / 2]
  char* scratch;
  int* next;
  int* meta_next;
  float* logits;  // [rows, V] or null
};

// -- small things -----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void stop_if_stuck(u32& tries) {
  if (++tries > (1u << 26)) __trap();
}
__device__ __forceinline__ void mbar_wait(u32 bar, u32 parity) {
  u32 done = 0, tries = 0;
  while (!done) {
    done = mbar_try_wait(bar, parity);
    stop_if_stuck(tries);
  }
}
__device__ __forceinline__ float2 two(u32 v) { return __bfloat1622float2(*reinterpret_cast<__nv_bfloat162*>(&v)); }
__device__ __forceinline__ u32 times(u32 a, u32 b) {
  const __nv_bfloat162 v = __hmul2(*reinterpret_cast<__nv_bfloat162*>(&a), *reinterpret_cast<__nv_bfloat162*>(&b));
  return *reinterpret_cast<const u32*>(&v);
}
__device__ __forceinline__ u32 pack(float a, float b) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<u32*>(&v);
}
// Return eight values of 4 bits: 0 and 4 of the bits hold the first pair, 1 and 5 the next. A scale, then a bias, each
// of 16 bits. 0x4300 is 128, where the last bit of a bfloat16 is 1.
__device__ __forceinline__ uint4 unpacked(u32 q, u32 scale_bias) {
  const u32 scale = __byte_perm(scale_bias, 0, 0x1010), bias = __byte_perm(scale_bias, 0, 0x3232);
  u32 found[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 far = 0x43004300u, v = and_or<0x000f000fu>(q >> (4 * i), far);
    const __nv_bfloat162 n =
        __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&v), *reinterpret_cast<const __nv_bfloat162*>(&far));
    const __nv_bfloat162 w =
        __hfma2(n, *reinterpret_cast<const __nv_bfloat162*>(&scale), *reinterpret_cast<const __nv_bfloat162*>(&bias));
    found[i] = *reinterpret_cast<const u32*>(&w);
  }
  return make_uint4(found[0], found[1], found[2], found[3]);
}
__device__ __forceinline__ float round_bf(float v) { return __bfloat162float(__float2bfloat16(v)); }

// -- a block's view of the step ---------------------------------------------------------------------------------------

struct Unit {  // what a warp's stream brings next
  int layer, p, pass, u;
};

struct Part {                           // a part of the key-value cache that a block attends to for one of the heads
  int sequence, stored, split, splits;  // of the step, of the cache; which part of how many
  int first, chunk, c0, c1;             // column of the first new token, columns of a part, columns of this one
};
static_assert(sizeof(Part) == 32, "");

struct Block {
  Args a;
  char* sm;
  int b, n, tid, warp, lane, g, t, M;
  Unit ahead;
  u32 taken;  // units used so far by this warp

  // the block's rows (channels of gate and up) in a phase, and their units: worked out once, see step()
  __device__ __forceinline__ int lo(int p) const { return reinterpret_cast<const int*>(sm + AT_MISC)[1 + 3 * p]; }
  __device__ __forceinline__ int hi(int p) const { return reinterpret_cast<const int*>(sm + AT_MISC)[2 + 3 * p]; }
  __device__ __forceinline__ int units(int p) const { return reinterpret_cast<const int*>(sm + AT_MISC)[3 + 3 * p]; }
  __device__ __forceinline__ const int* meta() const { return reinterpret_cast<const int*>(sm + AT_META); }
  __device__ __forceinline__ Part part(int i) const { return reinterpret_cast<const Part*>(sm + AT_PART)[i]; }
  // cosine and sine of each row's position, [M, DIM / 2]
  __device__ __forceinline__ u32* turns() const { return reinterpret_cast<u32*>(sm + AT_TURNS); }
  __device__ __forceinline__ long head_at(int layer, const Part& part) const {
    return (((long)layer * meta()[1] + part.stored) * KV + b % KV) * meta()[0] * DIM;
  }
  __device__ __forceinline__ bf* keys(int layer, const Part& part) const { return a.keys + head_at(layer, part); }
  __device__ __forceinline__ bf* values(int layer, const Part& part) const { return a.values + head_at(layer, part); }
  __device__ __forceinline__ char* at(long offset) const { return a.scratch + offset; }
  __device__ __forceinline__ const bf* matrix_a(int layer, int p) const {
    return a.lora + layer * lora_at(4) + lora_at(p);
  }
  __device__ __forceinline__ const bf* matrix_b(int layer, int p) const {
    return matrix_a(layer, p) + (long)low(p) * inputs(p);
  }
  // z of the next product of this kind, copies of [M, low(p)]: zero but between the phase that makes its inputs and
  // its own
  __device__ __forceinline__ long long* z_at(int p, int copy) const {
    return reinterpret_cast<long long*>(at(S_Z)) + (p * COPIES + copy) * Z_COPY;
  }
  __device__ __forceinline__ bf* own_a() const { return reinterpret_cast<bf*>(sm + AT_A); }
  __device__ __forceinline__ bf* own_x(int m) const { return reinterpret_cast<bf*>(sm + AT_X) + m * OWN_PITCH; }
  __device__ __forceinline__ bf* own_b() const { return reinterpret_cast<bf*>(sm + AT_B); }
  __device__ __forceinline__ bf* z_here() const { return reinterpret_cast<bf*>(sm + AT_Z); }
  __device__ __forceinline__ void fetch(bf* to, const bf* from, int count) const {  // a multiple of 8 values
#pragma unroll 1
    for (int i = tid * 8; i < count; i += THREADS * 8) copy_async(shared_at(to + i), from + i);
  }
  // Fetch what this block's inputs of a product give to z, [count, low(p)].
  __device__ __forceinline__ void fetch_a(int layer, int p, int first, int count) const {
    fetch(own_a(), matrix_a(layer, p) + (long)first * low(p), count * low(p));
  }
  // Fetch this block's rows of B; those of up after those of gate.
  template <int P>
  __device__ __forceinline__ void fetch_b(int layer) const {
    const int count = (hi(P) - lo(P)) * RANK;
    const bf* from = matrix_b(layer, P) + (long)lo(P) * RANK;
    fetch(own_b(), from, count);
    if (P == 2) fetch(own_b() + count, from + (long)F * RANK, count);
  }
  // Add to z what this block's ``count`` inputs in own_x give; all that was fetched and written is there. Column i of
  // eight that the tensor cores make is number i / 2 + i % 2 * 4 of z, so that four threads add side by side.
  template <int P>
  __device__ __forceinline__ void add_z(int count) const {
#pragma unroll 1
    for (int n = warp * 8; n < low(P); n += WARPS * 8) {
      float acc[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int i = 0; i < count; i += 16) {
        u32 x[4], b0, b1;
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int at = i + j / 2 * 8 + 2 * t;
          x[j] = j % 2 < HALVES ? *reinterpret_cast<const u32*>(own_x(g + j % 2 * 8) + at) : 0;
          x[j] &= (at < count ? 0xffffu : 0) | (at + 1 < count ? 0xffff0000u : 0);
        }
        load_transposed(b0, b1, shared_at(own_a() + (i + lane % 16) * low(P) + n));
        mma(acc, x[0], x[1], x[2], x[3], b0, b1);
      }
#pragma unroll
      for (int j = 0; j < 2 * HALVES; j++)
        if (g + j / 2 * 8 < M)
          add_relaxed(z_at(P, b % COPIES) + (g + j / 2 * 8) * low(P) + n + t + j % 2 * 4,
                      __float2ll_rn(acc[j] * Z_ONE));
    }
  }
  __device__ __forceinline__ u32 bar(u32 slot) const { return shared_at(sm + AT_BAR) + (warp * SLOTS + slot) * 8; }
  __device__ __forceinline__ char* slot(u32 s) const { return sm + (warp * SLOTS + s) * SLOT; }

  // Return where this lane's rows of a unit lie, whether there are any, and their length in bytes. 16 bits: a row a
  // lane, of a matrix as it stands. 4 bits: rows in a run, of a matrix by warp, pass and row.
  __device__ __forceinline__ bool source(const Unit& unit, const char*& from, int& size, int& to) const {
    const int p = unit.p;
    const int count = p == 0 ? passes(0) : p == 1 ? passes(1) : p == 2 ? passes(2) : p == 3 ? passes(3) : passes(4);
    size = p == 0 ? bytes(0) : p == 1 ? bytes(1) : p == 2 ? bytes(2) : p == 3 ? bytes(3) : bytes(4);
    const int pad = p == 0 ? pitch(0) : p == 1 ? pitch(1) : p == 2 ? pitch(2) : p == 3 ? pitch(3) : pitch(4);
    const int high = p == 0 || p == 4 ? 16 : 8, first = lo(p) + unit.u * high;
    from = reinterpret_cast<const char*>(
        reinterpret_cast<const long*>(sm + AT_TABLE)[p == 4 ? LAYERS * 4 : unit.layer * 4 + p]);
    if (BITS == 4) {
      const int all = p == 0 ? QKV : p == 2 ? 2 * F : p == 4 ? V : E;
      from += ((long)(warp * count + unit.pass) * all + first + (lane ? F : 0)) * size;
      size *= min(high, hi(p) - first), to = lane * 8 * pad;
      return lane < (p == 2 ? 2 : 1);
    }
    int row = first + (p == 2 ? lane & 7 : lane);
    const bool valid = lane < (p == 2 ? 16 : high) && row < hi(p);
    if (p == 2 && lane & 8) row += F;
    from += (long)row * inputs(p) * 2 + (long)(warp * count + unit.pass) * size;
    to = lane * pad;
    return valid;
  }
  __device__ __forceinline__ void advance(Unit& unit) const {
    const int p = unit.p;
    if (p > 4 || ++unit.u < units(p)) return;
    unit.u = 0;
    if (++unit.pass < (p == 0 ? passes(0) : p == 1 ? passes(1) : p == 2 ? passes(2) : p == 3 ? passes(3) : passes(4)))
      return;
    unit.pass = 0;
    unit.p = p + 1;
    if (p == 3 && ++unit.layer < LAYERS) unit.p = 0;
  }
  // Start the copies of the next unit into a slot that is free.
  __device__ __forceinline__ void issue(u32 s) {
    const char* from;
    int size, to;
    if (ahead.p <= 4) {
      const bool valid = source(ahead, from, size, to);
      const u32 total = __popc(__ballot_sync(~0u, valid)) * size;
      if (lane == 0) mbar_arrive_expect(bar(s), total);
      __syncwarp();
      if (valid) copy_bulk(shared_at(slot(s) + to), from, size, bar(s));
      advance(ahead);
    }
  }
  __device__ __forceinline__ const char* take() {
    u32 s = taken % SLOTS;
    mbar_wait(bar(s), (taken / SLOTS) & 1);
    return slot(s);
  }
  __device__ __forceinline__ void give() {
    __syncwarp();
    issue(taken % SLOTS);
    taken++;
  }

  // Ask the L2 cache for what a layer reads besides its matrices and the key-value cache. Copies of several
  // microseconds wait in front of device memory at any time: what is not asked for long before comes late.
  __device__ __forceinline__ void prefetch_layer(int layer) const {
    const int norm = (layer < LAYERS ? NORMS : E) * 2, size = norm + (RANK && layer < LAYERS ? lora_at(4) * 2 : 0);
    // not by the warp that arrives at the barrier, which would wait for them
#pragma unroll 1
    for (int i = (b * (THREADS - 32) + tid - 32) * 128; tid >= 32 && i < size; i += n * (THREADS - 32) * 128)
      prefetch_l2(i < norm ? reinterpret_cast<const char*>(a.norms + (long)layer * NORMS) + i
                           : reinterpret_cast<const char*>(matrix_a(layer, 0)) + (i - norm));
  }

  // Keep the compiler from working out one phase's indices in another, where they would only take registers.
  __device__ __forceinline__ void forget() { decode::forget(warp, lane, g, t); }
  // the barrier over the grid, in two halves; its highest bit before the next release is kept in shared memory: spilled
  // from a register it would be read from the L2 cache, since every look at the barrier empties L1
  __device__ __forceinline__ u32& ticket() const { return reinterpret_cast<u32*>(sm + AT_MISC)[16]; }
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (tid == 0) add_release(at(S_BAR), b == 0 ? 0x80000000u - (n - 1) : 1u);
  }
  __device__ __forceinline__ void wait() {
    if (tid == 0) {
      const u32 before = ticket();
      u32 tries = 0;
      while (((before ^ load_acquire(reinterpret_cast<u32*>(at(S_BAR)))) & 0x80000000u) == 0) stop_if_stuck(tries);
      ticket() = before ^ 0x80000000u;
    }
    __syncthreads();
  }
  // Count this block in, once it has written its part; return whether it is the last of ``blocks``: it then sees all
  // parts.
  __device__ __forceinline__ bool comes_last(u32* count, u32 blocks) {
    int* found = reinterpret_cast<int*>(sm + AT_MISC);
    __syncthreads();
    if (tid == 0) {
      *found = add_acq_rel(count, 1) == blocks - 1;
      if (*found) *count = 0;
    }
    __syncthreads();
    return *found;
  }
};

}  // namespace decode

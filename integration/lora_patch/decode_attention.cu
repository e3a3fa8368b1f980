// Attention of a decoding step (see decode.cu): the cache is split over blocks, the last of a head puts it together.
namespace decode {

// -- attention --------------------------------------------------------------------------------------------------------

// How many of a head's parts are attended to at a time, a block each.
__device__ __forceinline__ int parts_at_once(int blocks) { return min(blocks / KV, 32); }

// Return the block's part ``i``, or one without a sequence after its last.
__device__ __forceinline__ Part part_of(const Block& k, int i) {
  const int* meta = k.meta();
  const int per = parts_at_once(k.n), T = meta[3], S = k.M / T, splits = max(per / S, 1), item = k.b / KV + i * per;
  if (k.b / KV >= per || item >= S * splits) return {-1, 0, 0, 0, 0, 0, 0, 0};
  const int* row = meta + 4 + 3 * (item % S) * T;  // (sequence, column, position) of the first new token
  const int chunk = up_to((row[1] + T + splits - 1) / splits, 32), c0 = item / S * chunk;
  return {item % S, row[0], item / S, splits, row[1], chunk, c0, min(row[1] + T, c0 + chunk)};
}

// Ask the L2 cache for a block's first part, columns ``from`` to ``to`` of it.
__device__ __forceinline__ void prefetch_cache(const Block& k, int layer, int from, int to) {
  const Part part = k.part(0);
  const int columns = k.meta()[0], c0 = part.c0 + from, c1 = min(part.c1, part.c0 + to),
            lines = (c1 - c0 + 63) / 64 + 1;
  if (part.sequence < 0 || c0 >= c1) return;
  const bf *keys = k.keys(layer, part), *values = k.values(layer, part);
#pragma unroll 1
  for (int i = k.tid - 32; k.tid >= 32 && i < (c1 - c0) * DIM / 64; i += THREADS - 32)
    prefetch_l2(keys + (long)c0 * DIM + i * 64);
#pragma unroll 1
  for (int i = k.tid - 32; k.tid >= 32 && i < DIM * lines; i += THREADS - 32)
    prefetch_l2(values + (long)(i / lines) * columns + min(c0 + i % lines * 64, c1 - 1));
}

// Normalise and turn one head of 128 (or 64) values of token ``m``, held DIM / 32 to a lane: lane, lane + 32, ...
__device__ __forceinline__ void turned(const Block& k, const float* from, const bf* weight, int m,
                                       float (&v)[DIM / 32]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) {
    v[i] = __ldcg(from + k.lane + 32 * i);
    sum += v[i] * v[i];
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  const float f = rsqrtf(sum / DIM + EPS);
#pragma unroll
  for (int i = 0; i < DIM / 32; i++) v[i] = round_bf(v[i] * f * __bfloat162float(weight[k.lane + 32 * i]));
#pragma unroll
  for (int i = 0; i < DIM / 64; i++) {
    const float2 turn = two(k.turns()[m * (DIM / 2) + k.lane + 32 * i]);
    const float a = v[i], b = v[i + DIM / 64];
    v[i] = a * turn.x - b * turn.y;
    v[i + DIM / 64] = b * turn.x + a * turn.y;
  }
}

__device__ __forceinline__ void attention(Block& k, int layer) {
  k.forget();

  const int kvh = k.b % KV, columns = k.meta()[0], T = k.meta()[3];
  char* qs = k.sm + AT_PARTS;
  char* ps = qs + 16 * Q_PITCH;
  float* sc = reinterpret_cast<float*>(ps + 16 * P_PITCH);
  float* top_of = sc + 16 * S_PITCH;  // of each query: highest score, sum of weights, how the last columns scale
  const bf* norms = k.a.norms + (long)layer * NORMS + 2 * E;
  const float* qkv = reinterpret_cast<const float*>(k.at(S_QKV));
  float* out = reinterpret_cast<float*>(k.at(S_PO));
  float2* ml = reinterpret_cast<float2*>(k.at(S_ML));
  uint4 kr[(SUB + 63) / 64][DIM / 32], vr[DIM / 64][SUB / 32];
  Part part = k.part(0);
  bf *keys = k.keys(layer, part), *values = k.values(layer, part);
  auto load = [&](int base, int from) {  // columns base .. base + SUB that are ``from`` or later
#pragma unroll
    for (int i = 0; i < (SUB + 63) / 64; i++) {
      const int col = base + (k.warp + i * WARPS) * 8 + k.g;
      if (col - k.g < min(part.c1, base + SUB) && col >= from)
#pragma unroll
        for (int c = 0; c < DIM / 32; c++)
          kr[i][c] = *reinterpret_cast<const uint4*>(keys + (long)col * DIM + c * 32 + k.t * 8);
    }
#pragma unroll
    for (int i = 0; i < DIM / 64; i++)
#pragma unroll
      for (int c = 0; c < SUB / 32; c++)
        if (base + c * 32 < part.c1 && base + c * 32 + k.t * 8 + 7 >= from)
          vr[i][c] = *reinterpret_cast<const uint4*>(values + (long)((k.warp + i * WARPS) * 8 + k.g) * columns + base +
                                                     c * 32 + k.t * 8);
  };
  const bf* head_a = RANK ? k.matrix_a(layer, 1) + kvh * GROUP * DIM : nullptr;  // of each rank; QW values apart
  int a_pitch = QW;
  if (RANK && HEAD_A_FITS && part.sequence >= 0) {
#pragma unroll 1
    for (int i = k.tid; i < RANK * GROUP * DIM / 8; i += THREADS)
      copy_async(shared_at(qs + ATTENTION + i / (GROUP * DIM / 8) * HEAD_A_PITCH * 2 + i % (GROUP * DIM / 8) * 16),
                 head_a + (long)(i / (GROUP * DIM / 8)) * QW + i % (GROUP * DIM / 8) * 8);
    head_a = reinterpret_cast<const bf*>(qs + ATTENTION), a_pitch = HEAD_A_PITCH;
  }
  if (part.sequence >= 0) {  // the cache does not depend on this layer's queries: fetch it while others finish
    if (part.c0 < part.c1) load(part.c0, 0);
    prefetch_cache(k, layer, EARLY, 1 << 30);
  }
  k.wait();
#pragma unroll 1
  for (int item = 0; item < PARTS_OF; item++) {
    if (item) part = k.part(item), keys = k.keys(layer, part), values = k.values(layer, part);
    if (part.sequence < 0) break;
    const int s = part.sequence, first = part.first, c0 = part.c0, c1 = part.c1;
    if (c0 < c1) {
#pragma unroll 1
      for (int j = k.warp; j < 8 * ((2 * T + 7) / 8); j += WARPS) {  // the new columns that are this block's
        const int which = j / 8 * 8 + 7 - j % 8, t = which / 2, col = first + t;
        if (t >= T || col < c0 || col >= c1) continue;
        const float* from = qkv + (long)(s * T + t) * QKV + QW + kvh * DIM;
        if (which % 2) {
#pragma unroll 1
          for (int i = k.lane; i < DIM; i += 32)
            values[(long)i * columns + col] = __float2bfloat16(__ldcg(from + KW + i));
        } else {
          float v[DIM / 32];
          turned(k, from, norms + DIM, s * T + t, v);
#pragma unroll
          for (int i = 0; i < DIM / 32; i++) keys[(long)col * DIM + k.lane + 32 * i] = __float2bfloat16(v[i]);
        }
      }
#pragma unroll 1
      for (int r0 = 0; r0 < GROUP * T; r0 += 16) {
        if (r0 || item) load(c0, 0);
        const int real = min(16, GROUP * T - r0);  // queries; what stands in the other rows is never used
#pragma unroll 1
        for (int r = k.warp; r < real; r += WARPS) {
          const int t = (r0 + r) / GROUP, h = (r0 + r) % GROUP;
          float v[DIM / 32];
          turned(k, qkv + (long)(s * T + t) * QKV + (kvh * GROUP + h) * DIM, norms, s * T + t, v);
#pragma unroll
          for (int i = 0; i < DIM / 32; i++)
            reinterpret_cast<bf*>(qs + r * Q_PITCH)[k.lane + 32 * i] = __float2bfloat16(v[i]);
        }
        float o[DIM / 64][4] = {};
#pragma unroll 1
        for (int base = c0; base < c1; base += SUB) {
          if (base > c0) load(base, 0);
          __syncthreads();
          if (base + SUB > first) load(base, first);  // again what has just been written
#pragma unroll
          for (int i = 0; i < (SUB + 63) / 64; i++) {
            const int col = base + (k.warp + i * WARPS) * 8;
            if (col >= min(c1, base + SUB)) continue;
            float acc[4] = {0, 0, 0, 0}, other[4] = {0, 0, 0, 0};
#pragma unroll
            for (int c = 0; c < DIM / 32; c++) {
              uint4 p = *reinterpret_cast<const uint4*>(qs + k.g * Q_PITCH + c * 64 + k.t * 16);
              uint4 q = *reinterpret_cast<const uint4*>(qs + (k.g + 8) * Q_PITCH + c * 64 + k.t * 16);
              mma(acc, p.x, q.x, p.y, q.y, kr[i][c].x, kr[i][c].y);
              mma(other, p.z, q.z, p.w, q.w, kr[i][c].z, kr[i][c].w);
            }
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const int r = k.g + (e / 2) * 8, c = col + 2 * k.t + e % 2, t = (r0 + r) / GROUP;
              sc[r * S_PITCH + c - base] = c <= first + t && c < c1 ? (acc[e] + other[e]) * rsqrtf((float)DIM) : NONE;
            }
          }
          __syncthreads();
          const int wide = (min(SUB, c1 - base) + 31) / 32 * 32, held = (min(SUB, c1 - base) + 7) / 8 * 8;
#pragma unroll 1
          for (int r = k.warp; r < real; r += WARPS) {
            float v[SUB / 32], top = NONE, sum = 0;
#pragma unroll
            for (int i = 0; i < SUB / 32; i++) {
              v[i] = k.lane + 32 * i < held ? sc[r * S_PITCH + k.lane + 32 * i] : NONE;
              top = fmaxf(top, v[i]);
            }
            for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
            const float before = base > c0 ? top_of[r] : NONE;
            top = fmaxf(top, before);
#pragma unroll
            for (int i = 0; i < SUB / 32; i++) {
              const float e = v[i] == NONE ? 0.0f : __expf(v[i] - top);
              sum += e;
              if (32 * i < wide) reinterpret_cast<bf*>(ps + r * P_PITCH)[k.lane + 32 * i] = __float2bfloat16(e);
            }
            for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
            if (k.lane == 0) {
              const float f = before == NONE ? 0.0f : __expf(before - top);
              top_of[r] = top;
              top_of[16 + r] = base > c0 ? top_of[16 + r] * f + sum : sum;
              top_of[32 + r] = f;
            }
          }
          __syncthreads();
          const float f0 = top_of[32 + k.g], f1 = top_of[40 + k.g];
#pragma unroll
          for (int i = 0; i < DIM / 64; i++) {
            if (base > c0) o[i][0] *= f0, o[i][1] *= f0, o[i][2] *= f1, o[i][3] *= f1;
#pragma unroll
            for (int c = 0; c < SUB / 32; c++) {
              if (c * 32 >= wide) break;
              uint4 p = *reinterpret_cast<const uint4*>(ps + k.g * P_PITCH + c * 64 + k.t * 16);
              uint4 q = *reinterpret_cast<const uint4*>(ps + (k.g + 8) * P_PITCH + c * 64 + k.t * 16);
              mma(o[i], p.x, q.x, p.y, q.y, vr[i][c].x, vr[i][c].y);
              mma(o[i], p.z, q.z, p.w, q.w, vr[i][c].z, vr[i][c].w);
            }
          }
        }
        const long at = (long)(kvh * 32 + part.split) * 16 * GROUP + s * T * GROUP + r0;
#pragma unroll
        for (int i = 0; i < DIM / 64; i++)
#pragma unroll
          for (int h = 0; h < 2; h++)
            if (k.g + 8 * h < real)
              __stcg(reinterpret_cast<float2*>(out + (at + k.g + 8 * h) * DIM + (k.warp + i * WARPS) * 8 + 2 * k.t),
                     make_float2(o[i][2 * h], o[i][2 * h + 1]));
        if (k.tid < real) __stcg(ml + at + k.tid, make_float2(top_of[k.tid], top_of[16 + k.tid]));
        __syncthreads();
      }
    }
    // the last block of a head and sequence puts the parts together, and adds what they give to z
    if (!k.comes_last(reinterpret_cast<u32*>(k.at(S_BAR)) + 128 + kvh * 16 + s, part.splits)) continue;
    const int used = (first + T + part.chunk - 1) / part.chunk;
    auto found_at = [&](int split, int r) { return (long)(kvh * 32 + split) * 16 * GROUP + s * T * GROUP + r; };
    float2 v[16];
    auto fetch = [&](int i, int from) {
#pragma unroll
      for (int j = 0; j < 16; j++)
        v[j] = __ldcg(reinterpret_cast<const float2*>(out + found_at(min(from + j, used - 1), i / (DIM / 2)) * DIM +
                                                      i % (DIM / 2) * 2));
    };
    fetch(min(k.tid, T * GROUP * DIM / 2 - 1), 0);
#pragma unroll 1
    for (int r = k.warp; r < T * GROUP; r += WARPS) {  // the weight of each part: a lane a part
      const float2 e = k.lane < used ? __ldcg(ml + found_at(k.lane, r)) : make_float2(NONE, 0);
      float top = e.x;
      for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
      const float f = e.x == NONE ? 0.0f : __expf(e.x - top);
      float sum = f * e.y;
      for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
      sc[r * 32 + k.lane] = __fdividef(f, sum);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = k.tid; i < T * GROUP * DIM / 2; i += THREADS) {
      const int r = i / (DIM / 2), d = i % (DIM / 2) * 2;
      if (i != k.tid) fetch(i, 0);
      float2 o = make_float2(0, 0);
#pragma unroll 1
      for (int from = 0;;) {
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const float f = sc[r * 32 + from + j];
          o.x += f * v[j].x, o.y += f * v[j].y;
        }
        if ((from += 16) >= used) break;
        fetch(i, from);
      }
      u32* to = reinterpret_cast<u32*>(reinterpret_cast<bf*>(k.at(S_ATT)) + (long)(s * T + r / GROUP) * QW +
                                       (kvh * GROUP + r % GROUP) * DIM + d);
      __stcg(to, pack(o.x, o.y));
      if (RANK) *reinterpret_cast<u32*>(qs + (r * DIM + d) * 2) = pack(o.x, o.y);
    }
    if (RANK) {  // each warp takes a part of the head's values
      constexpr int WIDTH = GROUP * DIM, OWN_K = WIDTH / WARPS;
      static_assert(OWN_K % 16 == 0, "see refusal()");
      wait_copies();
      __syncthreads();
#pragma unroll 1
      for (int n = 0; n < RANK; n += 8) {
        float acc[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < OWN_K; i += 16) {
          const int at = k.warp * OWN_K + i + 2 * k.t;
          const u32* x = reinterpret_cast<const u32*>(qs + (min(k.g, T - 1) * WIDTH + at) * 2);
          const u32* a = reinterpret_cast<const u32*>(head_a + (long)(n + k.g / 2 + k.g % 2 * 4) * a_pitch + at);
          mma(acc, x[0], 0, x[4], 0, a[0], a[4]);
        }
        if (k.g < T) {
          long long* z = k.z_at(1, k.b % COPIES) + (s * T + k.g) * RANK + n + k.t;
          add_relaxed(z, __float2ll_rn(acc[0] * Z_ONE));
          add_relaxed(z + 4, __float2ll_rn(acc[1] * Z_ONE));
        }
      }
      __syncthreads();
    }
  }
  if (RANK) wait_copies();  // the memory is the next product's
  k.arrive();
}

}  // namespace decode

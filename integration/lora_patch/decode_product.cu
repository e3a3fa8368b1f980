// The products of a decoding step (see decode.cu), the output head's with the choice of the token.
namespace decode {

template <int P>
__device__ __forceinline__ void multiply(const char* from, const u32 (&x)[chunks(P)][4 * HALVES], float (&acc)[4],
                                         int g, int t) {
  constexpr int H = 4 * (HALVES - 1);
  float part[4][4] = {};  // four chains: a tensor core's answer takes as long as several products
#pragma unroll
  for (int c = 0; c < chunks(P); c++) {
    const char* row = from + g * pitch(P);
    uint4 w;
    if (BITS == 4)
      w = unpacked(*reinterpret_cast<const u32*>(row + c * 16 + t * 4),
                   *reinterpret_cast<const u32*>(row + chunks(P) * 16 + c * 4));
    else
      w = *reinterpret_cast<const uint4*>(row + c * 64 + t * 16);
    mma(part[c % 2 * 2], x[c][0], H ? x[c][H] : 0, x[c][1], H ? x[c][H + 1] : 0, w.x, w.y);
    mma(part[c % 2 * 2 + 1], x[c][2], H ? x[c][H + 2] : 0, x[c][3], H ? x[c][H + 3] : 0, w.z, w.w);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) acc[i] = part[0][i] + part[1][i] + part[2][i] + part[3][i];
}

// Add B z of eight rows, the block's rows ``first`` and on; those of up come after all those of gate.
template <int P>
__device__ __forceinline__ void update(const Block& k, int first, int up, float (&acc)[4]) {
  // rows of q, k and v have z of their own, and eight may have rows of two
  auto member = [&](int row) { return P == 0 ? (k.lo(0) + row >= QW) + (k.lo(0) + row >= QW + KW) : 0; };
  const int row = first + k.g;
  const u32* b = reinterpret_cast<const u32*>(k.own_b() + (row + (P == 2 && up ? k.hi(P) - k.lo(P) : 0)) * RANK);
  auto add = [&](int of, bool mine) {
#pragma unroll
    for (int i = 0; i < RANK; i += 16) {
      u32 z[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        z[j] =
            j % 2 < HALVES && i + j / 2 * 8 < RANK
                ? reinterpret_cast<const u32*>(k.z_here() + (k.g + j % 2 * 8) * low(P) + of * RANK + i)[j / 2 * 4 + k.t]
                : 0;
      mma(acc, z[0], z[1], z[2], z[3], mine ? b[i / 2 + k.t] : 0, mine && i + 8 < RANK ? b[i / 2 + 4 + k.t] : 0);
    }
  };
  if (P == 0) {
    const int own = member(row);
#pragma unroll 1
    for (int of = member(first); of <= member(first + 7); of++) add(of, own == of);
  } else {
    add(P == 2 ? up : 0, true);
  }
}

// One product: x0 or x1, attended values or activations in, finished outputs out.
template <int P>
__device__ __forceinline__ void product(Block& k, int layer) {
  k.forget();

  constexpr int N = chunks(P), T = tiles(P), NP = passes(P);
  constexpr bool NORMED = P == 0 || P == 2 || P == 4, UPDATED = RANK && P < 4;
  constexpr int HERE = P < 4 ? P : 0, BEFORE = (P + 3) % 4;
  constexpr int SPAN = P == 0 ? 64 : P == 2 ? 128 : P == 4 ? 256 : 32;  // threads side by side in the epilogue
  const int M = k.M, nu = k.units(P), lo = k.lo(P), hi = k.hi(P),
            at_once = min(SPAN / (T == 2 && P != 2 ? 16 : 8), HELD / M);
  float* parts = reinterpret_cast<float*>(k.sm + AT_PARTS);
  float* squares = reinterpret_cast<float*>(k.sm + AT_SS);

  // what does not depend on the phase before
  constexpr int NEXT = P == 1 ? 2 : P == 2 ? 3 : 0;  // the product whose inputs are finished here
  const bool feeds = RANK && (P == 1 || P == 2 || (P == 3 && layer + 1 < LAYERS));
  if (feeds) k.fetch_a(P == 3 ? layer + 1 : layer, NEXT, lo, hi - lo);
  if (UPDATED) k.fetch_b<HERE>(layer);
  if (P == 2) {  // long before it is read, and in the longest phase
    k.prefetch_layer(layer + 1);
    if (layer + 1 < LAYERS) prefetch_cache(k, layer + 1, 0, EARLY);
  }
  k.wait();
  constexpr int ZS = UPDATED ? (MB * low(HERE) + THREADS - 1) / THREADS : 1;
  long long z[ZS];
  if (UPDATED)
#pragma unroll
    for (int i = 0; i < ZS; i++) {
      z[i] = 0;
      if (k.tid + i * THREADS < M * low(HERE))
#pragma unroll
        for (int copy = 0; copy < COPIES; copy++) z[i] += __ldcg(k.z_at(HERE, copy) + k.tid + i * THREADS);
    }
  if (RANK && (layer || P))  // z of the product before has been read by all
#pragma unroll 1
    for (int i = k.tid * k.n + k.b; i < M * low(BEFORE) * COPIES; i += THREADS * k.n)
      k.z_at(BEFORE, i % COPIES)[i / COPIES] = 0;

  const bf* x = reinterpret_cast<const bf*>(k.at(P == 0 || P == 4 ? S_X0 : P == 1 ? S_ATT : P == 2 ? S_X1 : S_ACT));
  float best[P == 4 ? MB : 1];
  int best_at[P == 4 ? MB : 1];
  if (P == 4)
#pragma unroll
    for (int m = 0; m < MB; m++) best[m] = NONE, best_at[m] = 0;
#pragma unroll 1
  for (int pass = 0; pass < NP; pass++) {
    u32 in[N][4 * HALVES];
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
      float sum = 0;
      const int m = k.g + 8 * h;
      const bf* from = x + (long)m * inputs(P) + (k.warp * NP + pass) * N * 32 + k.t * 8;
      uint4 v[N], norm[NORMED ? N : 1];
      if (NORMED) {
        const bf* w = k.a.norms + (P == 4 ? (long)LAYERS * NORMS : (long)layer * NORMS + (P == 2 ? E : 0));
#pragma unroll
        for (int c = 0; c < N; c++)
          norm[NORMED ? c : 0] = *reinterpret_cast<const uint4*>(w + k.warp * N * 32 + c * 32 + k.t * 8);
      }
#pragma unroll
      for (int c = 0; c < N; c++) v[c] = m < M ? load_l2(from + c * 32) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int c = 0; c < N; c++) {
        if (NORMED) {
          const u32 a[4] = {v[c].x, v[c].y, v[c].z, v[c].w}, w[4] = {norm[NORMED ? c : 0].x, norm[NORMED ? c : 0].y,
                                                                     norm[NORMED ? c : 0].z, norm[NORMED ? c : 0].w};
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float2 p = two(a[i]);
            sum += p.x * p.x + p.y * p.y;
            in[c][4 * h + i] = times(a[i], w[i]);
          }
        } else {
          in[c][4 * h] = v[c].x, in[c][4 * h + 1] = v[c].y, in[c][4 * h + 2] = v[c].z, in[c][4 * h + 3] = v[c].w;
        }
      }
      if (NORMED) {  // the norm's factor is applied to the outputs: the same for a whole row
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (k.t == 0) squares[k.warp * MB + m] = sum;
      }
    }
    auto factor = [&](int m) {
      if (!NORMED) return 1.0f;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) sum += squares[w * MB + m];
      return rsqrtf(sum / inputs(P) + EPS);
    };
    if (UPDATED && pass == 0) {
#pragma unroll
      for (int i = 0; i < ZS; i++)
        if (k.tid + i * THREADS < M * low(HERE))
          k.z_here()[k.tid + i * THREADS] = __float2bfloat16((float)z[i] * (1 / Z_ONE));
      wait_copies();
      __syncthreads();
    }
    // a tile's sums: of each warp, and what the adapter adds
    auto keep = [&](int tile, int of, const float (&acc)[4], bool add) {
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        const int m = k.g + 8 * h;
        if (m >= M) continue;
        float2* to = reinterpret_cast<float2*>(parts + ((tile * SUMS + of) * M + m) * 8 + 2 * k.t);
        float2 sum = make_float2(acc[2 * h], acc[2 * h + 1]);
        if (add) {
          float2 old = *to;
          sum.x += old.x;
          sum.y += old.y;
        }
        *to = sum;
      }
    };
#pragma unroll 1
    for (int from_unit = 0; from_unit < nu; from_unit += at_once) {
      const int to_unit = min(nu, from_unit + at_once);
      if (UPDATED && pass == 0)
#pragma unroll 1
        for (int at = k.warp; at < (to_unit - from_unit) * T; at += WARPS) {
          const int tile = from_unit * T + at;
          float acc[4] = {0, 0, 0, 0};
          update<HERE>(k, P == 2 ? tile / 2 * 8 : tile * 8, tile % 2, acc);
          keep(at, WARPS, acc, false);
        }
#pragma unroll 1
      for (int u = from_unit; u < to_unit; u++) {
        const char* from = k.take();
#pragma unroll 1
        for (int i = 0; i < T; i++) {
          float acc[4];
          multiply<P>(from + i * 8 * pitch(P), in, acc, k.g, k.t);
          keep((u - from_unit) * T + i, k.warp, acc, NP > 1 && pass);
        }
        k.give();
      }
      if (pass < NP - 1) continue;
      __syncthreads();
      const int at = k.tid % SPAN;
      auto whole = [&](int tile, int m) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS + UPDATED; w++) sum += parts[((tile * SUMS + w) * M + m) * 8 + at % 8];
        return sum;
      };
      const int row = lo + from_unit * (P == 0 || P == 4 ? 16 : 8) + at;
      const bool mine = row < hi && at < (to_unit - from_unit) * (P == 0 || P == 4 ? 16 : 8);
      auto finish = [&](int m) {
        if (P == 0) {
          __stcg(reinterpret_cast<float*>(k.at(S_QKV)) + (long)m * QKV + row, whole(at / 8, m) * factor(m));
        } else if (P == 2) {
          const float f = factor(m);
          const float gate = whole(at / 8 * 2, m) * f, up = whole(at / 8 * 2 + 1, m) * f;
          const bf act = __float2bfloat16(__fdividef(gate, 1.0f + __expf(-gate)) * up);
          reinterpret_cast<bf*>(k.at(S_ACT))[(long)m * F + row] = act;
          if (feeds) k.own_x(m)[row - lo] = act;
        } else if (P == 4) {
          const float y = whole(at / 8, m) * factor(m);
          if (k.a.logits) k.a.logits[(long)m * V + row] = y;
          if (y > best[P == 4 ? m : 0]) best[P == 4 ? m : 0] = y, best_at[P == 4 ? m : 0] = row;
        } else {
          float y = whole(at / 8, m);
          const bf* old = reinterpret_cast<const bf*>(k.at(P == 1 ? S_X0 : S_X1)) + (long)m * E + row;
          y += __bfloat162float(__ldcg(old));
          reinterpret_cast<bf*>(k.at(P == 1 ? S_X1 : S_X0))[(long)m * E + row] = __float2bfloat16(y);
          if (feeds) k.own_x(m)[row - lo] = __float2bfloat16(y);
        }
      };
      if (mine && P == 4) {
#pragma unroll
        for (int m = 0; m < MB; m++)
          if (m < M) finish(m);
      } else if (mine) {
#pragma unroll 1
        for (int m = k.tid / SPAN; m < M; m += THREADS / SPAN) finish(m);
      }
      if (to_unit < nu) __syncthreads();
    }
  }
  if (P < 4) {
    if (feeds) {
      __syncthreads();
      k.add_z<NEXT>(hi - lo);
    }
    k.arrive();
    return;
  }
  // the best token of each row: of the block, then of the grid
  __syncthreads();
  float2* found = reinterpret_cast<float2*>(parts);
#pragma unroll
  for (int m = 0; m < MB; m++) {
    if (m >= M) break;
    float v = best[P == 4 ? m : 0];
    int i = best_at[P == 4 ? m : 0];
    for (int o = 16; o; o >>= 1) {
      float w = __shfl_xor_sync(~0u, v, o);
      int j = __shfl_xor_sync(~0u, i, o);
      if (w > v || (w == v && j < i)) v = w, i = j;
    }
    if (k.lane == 0) found[m * WARPS + k.warp] = make_float2(v, __int_as_float(i));
  }
  __syncthreads();
  float2* all = reinterpret_cast<float2*>(k.at(S_BEST));
  if (k.tid < M) {
    float2 v = found[k.tid * WARPS];
    for (int w = 1; w < WARPS; w++) {
      float2 o = found[k.tid * WARPS + w];
      if (o.x > v.x || (o.x == v.x && __float_as_int(o.y) < __float_as_int(v.y))) v = o;
    }
    __stcg(all + k.b * 16 + k.tid, v);
  }
  if (!k.comes_last(reinterpret_cast<u32*>(k.at(S_BAR)) + 64, k.n)) return;
  for (int m = k.warp; m < M; m += WARPS) {
    float v = NONE;
    int i = 0;
    for (int b = k.lane; b < k.n; b += 32) {
      float2 o = __ldcg(all + b * 16 + m);
      int j = __float_as_int(o.y);
      if (o.x > v || (o.x == v && j < i)) v = o.x, i = j;
    }
    for (int o = 16; o; o >>= 1) {
      float w = __shfl_xor_sync(~0u, v, o);
      int j = __shfl_xor_sync(~0u, i, o);
      if (w > v || (w == v && j < i)) v = w, i = j;
    }
    if (k.lane == 0) k.a.next[m] = i;
  }
  if (k.tid < 64) {
    int v = k.tid < 4 + 3 * 16 ? k.a.meta[k.tid] : 0;
    if (k.tid >= 4 && k.tid < 4 + 3 * M && (k.tid - 4) % 3) v += k.a.meta[3];
    k.a.meta_next[k.tid] = v;
  }
}

}  // namespace decode

// A decoding step (see decode.cu): embedding, layers, output head.
namespace decode {

// Return eight values of a token's embedding, 8 i and on.
__device__ __forceinline__ uint4 embedded(const char* table, int token, int i) {
  if (BITS == 16) return reinterpret_cast<const uint4*>(table + (long)token * E * 2)[i];
  const int c = i / 4 % chunks(4);
  const char* row = table + ((long)(i / 4 / chunks(4)) * V + token) * bytes(4);
  return unpacked(reinterpret_cast<const u32*>(row)[c * 4 + i % 4],
                  reinterpret_cast<const u32*>(row)[chunks(4) * 4 + c]);
}

__device__ __forceinline__ void step(const Args& args) {
  char* const shared = shared_memory();
  Block k;
  k.a = args, k.sm = shared;
  k.b = blockIdx.x, k.n = gridDim.x, k.tid = threadIdx.x, k.warp = threadIdx.x / 32, k.lane = threadIdx.x % 32;
  k.g = k.lane / 4, k.t = k.lane % 4, k.M = args.meta[2], k.taken = 0;
  if (k.tid < 64) reinterpret_cast<int*>(shared + AT_META)[k.tid] = args.meta[k.tid];
  if (k.tid == 0) k.ticket() = load_acquire(reinterpret_cast<u32*>(k.at(S_BAR)));
  for (int i = k.tid; i < LAYERS * 4 + 1; i += THREADS) reinterpret_cast<long*>(shared + AT_TABLE)[i] = args.table[i];
  if (k.tid < 5) {
    const int p = k.tid, of = p == 0 ? QKV : p == 2 ? F : p == 4 ? V : E, high = p == 0 || p == 4 ? 16 : 8;
    int* to = reinterpret_cast<int*>(shared + AT_MISC) + 1 + 3 * p;
    to[0] = (int)((long)of * k.b / k.n), to[1] = (int)((long)of * (k.b + 1) / k.n),
    to[2] = (to[1] - to[0] + high - 1) / high;
  }
  if (k.tid < SLOTS * WARPS) mbar_init(shared_at(shared + AT_BAR) + k.tid * 8, 1);
  mbar_init_fence();
  __syncthreads();
  k.ahead = {0, 0, 0, 0};
  for (int s = 0; s < SLOTS; s++) k.issue(s);
  k.prefetch_layer(0);
  if (k.tid < PARTS_OF) reinterpret_cast<Part*>(shared + AT_PART)[k.tid] = part_of(k, k.tid);
  for (int i = k.tid; i < k.M * DIM / 2; i += THREADS) {
    float s, c;
    sincosf(k.meta()[4 + 3 * (i / (DIM / 2)) + 2] * args.frequencies[i % (DIM / 2)], &s, &c);
    k.turns()[i] = pack(c, s);
  }
  for (int i = k.tid; i < A_BYTES / 4; i += THREADS)
    reinterpret_cast<u32*>(shared + AT_A)[i] = 0;  // no NaN where nothing is
  const char* table = reinterpret_cast<const char*>(args.table[LAYERS * 4 + 1]);
  for (int m = k.b; m < k.M; m += k.n)
    for (int i = k.tid; i < E / 8; i += THREADS)
      __stcg(reinterpret_cast<uint4*>(k.at(S_X0) + (long)m * E * 2) + i, embedded(table, args.tokens[m], i));
  __syncthreads();
  prefetch_cache(k, 0, 0, EARLY);
  if (RANK) {
    const int lo = k.lo(1), count = k.hi(1) - lo;
    k.fetch_a(0, 0, lo, count);
    for (int i = k.tid; i < k.M * count; i += THREADS) {
      const int at = lo + i % count;
      const uint4 v = embedded(table, args.tokens[i / count], at / 8);
      const float2 both = two(at & 4 ? at & 2 ? v.w : v.z : at & 2 ? v.y : v.x);
      k.own_x(i / count)[i % count] = __float2bfloat16(at & 1 ? both.y : both.x);
    }
    wait_copies();
    __syncthreads();
    k.add_z<0>(count);
  }
  k.arrive();
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    product<0>(k, layer);
    attention(k, layer);
    product<1>(k, layer);
    product<2>(k, layer);
    product<3>(k, layer);
  }
  product<4>(k, LAYERS);
}

}  // namespace decode

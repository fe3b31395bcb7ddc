// See pool.hpp. Memory order: items are handed out by compare-and-swap on a range (acquire), finished by a decrement of
// `remaining_` (release, acquire by the last), published by a store of `phase_` (release, acquire by whoever waits).
#include "pool.hpp"

#include <chrono>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif

namespace kvik {
namespace {

constexpr uint64_t kIndexOne = uint64_t{1} << 20, kFieldMask = kIndexOne - 1;
constexpr int kMaxItems = 1 << 20;
constexpr size_t kHugePage = 2 << 20;
constexpr int kSpins = 2000;        // pauses before a waiting worker starts to yield its core
constexpr int64_t kLookNs = 10000;  // for which it then looks whether another one runs
constexpr int64_t kTileBytes = 4 << 20;  // of packed activations that one item goes through, several tiles on a panel
constexpr int64_t kWideBytes = 1 << 20;  // the same where tiles are larger and products so fast that only L2 keeps up
constexpr int kItemsPerWorker = 6;  // of a large matrix product, so that the last ones finish together

inline void pause() {
#if defined(KVIK_X86)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

uint64_t tag(uint64_t phase) { return phase << 40; }

}  // namespace

Scratch::~Scratch() { std::free(data_); }

void* Scratch::get(size_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    size_t page = bytes < kHugePage ? 4096 : kHugePage;
    size_ = (bytes + bytes / 4 + page - 1) / page * page;
    if (posix_memalign(&data_, page, size_) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (page == kHugePage) madvise(data_, size_, MADV_HUGEPAGE);  // walks of small pages would cost more than the data
#endif
  }
  return data_;
}

Pool::Pool(int threads, int isa, const int32_t* cores, int64_t spin_ns)
    : threads_(threads < 1 ? 1 : threads), kernels_(kernels_for(isa)), spin_ns_(spin_ns),
      pulls_(threads_ <= usable_processors()) {
  if (cores) cores_.assign(cores, cores + threads_);
  ranges_.reset(new Range[threads_]);
  workers_.reset(new Worker[threads_]);
  try {
    for (int w = 1; w < threads_; ++w) {
      workers_[w].thread = std::thread([this, w] {
        pin(w);
        workers_[w].placement.attach();
        work(w);
      });
    }
  } catch (...) {
    end_threads();
    throw;
  }
}

Pool::~Pool() { end_threads(); }

void Pool::end_threads() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stop_.store(true);
  }
  sleep_.notify_all();
  for (int w = 1; w < threads_; ++w)
    if (workers_[w].thread.joinable()) workers_[w].thread.join();
}

void Pool::pin(int worker) const {
#if defined(__linux__)
  if (cores_.empty()) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cores_[worker], &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);
#else
  (void)worker;
#endif
}

void Pool::run(const KvikOp* ops, int num_ops, const KvikStep* step) {
  std::lock_guard<std::mutex> lock(run_mutex_);
#if defined(__linux__)
  cpu_set_t before;
  bool pinned = !cores_.empty() && pthread_getaffinity_np(pthread_self(), sizeof before, &before) == 0;
  if (pinned) pin(0);
#endif
  ops_ = ops, num_ops_ = num_ops, op_index_ = -1, num_stages_ = 0;
  job_ = Job();
  job_.step = step;
  stage_begin_ = profiling_ ? now_ns() : 0;
  workers_[0].placement.attach();
  workers_[0].waits.store(false, std::memory_order_relaxed);
  advance(workers_[0].scratch);
  work(0);
  workers_[0].waits.store(true, std::memory_order_relaxed);
  workers_[0].placement.detach();
  kernels_.leave(workers_[0].scratch);
#if defined(__linux__)
  if (pinned) pthread_setaffinity_np(pthread_self(), sizeof before, &before);
#endif
}

void Pool::profile(double* seconds) {
  std::lock_guard<std::mutex> lock(run_mutex_);
  for (int i = 0; i < KVIK_OP_COUNT; ++i) {
    seconds[i] = seconds_[i];
    seconds_[i] = 0;
  }
  profiling_ = true;
}

void Pool::work(int worker) {
  Worker& self = workers_[worker];
  for (;;) {
    uint64_t phase = phase_.load(std::memory_order_acquire);
    if (worker == 0 && phase == idle_at_.load(std::memory_order_acquire)) return;
    int done = 0, item = -1;
    while (!self.placement.pulled() && (item = take(phase, worker)) >= 0) {
      execute(item, self.scratch);
      ++done;
    }
    if (done && remaining_.fetch_sub(done, std::memory_order_acq_rel) == done) {
      advance(self.scratch);
    } else if (item < 0 && !self.placement.pulled()) {
      self.waits.store(true, std::memory_order_relaxed);
      if (!wait(phase, worker)) return;
      self.waits.store(false, std::memory_order_relaxed);
    }
    self.placement.leave();
  }
}

// One item of stage `phase`: of the worker's own range, else of another's. -1 when none is left or the stage is over.
int Pool::take(uint64_t phase, int worker) {
  for (int i = 0; i < threads_; ++i) {
    std::atomic<uint64_t>& next = ranges_[(worker + i) % threads_].next;
    uint64_t value = next.load(std::memory_order_acquire);
    for (;;) {
      if ((value ^ tag(phase)) >> 40 != 0) return -1;
      uint64_t index = (value >> 20) & kFieldMask;
      if (index >= (value & kFieldMask)) break;
      if (next.compare_exchange_weak(value, value + kIndexOne, std::memory_order_acq_rel)) return int(index);
    }
  }
  return -1;
}

void Pool::publish(int items) {
  uint64_t phase = phase_.load(std::memory_order_relaxed) + 1;
  remaining_.store(items, std::memory_order_relaxed);
  for (int w = 0; w < threads_; ++w) {
    uint64_t first = uint64_t(items) * w / threads_, end = uint64_t(items) * (w + 1) / threads_;
    ranges_[w].next.store(tag(phase) | first << 20 | end, std::memory_order_release);
  }
  phase_.store(phase);
  if (sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    sleep_.notify_all();
  }
}

// Sets up stages until one is worth sharing; the others are done here at once. At the end of the tape, ends the run.
void Pool::advance(Scratch& scratch) {
  for (;;) {
    if (profiling_ && op_index_ >= 0) {
      int64_t time = now_ns();
      seconds_[ops_[op_index_].code] += 1e-9 * double(time - stage_begin_);
      stage_begin_ = time;
    }
    if (!next_stage()) {
      uint64_t end = phase_.load(std::memory_order_relaxed) + 1;
      idle_at_.store(end, std::memory_order_release);
      phase_.store(end);  // the caller may start the next run from here on
      return;
    }
    if (num_items_ > 0 && !is_tiny()) return publish(num_items_);
    for (int item = 0; item < num_items_; ++item) execute(item, scratch);
  }
}

bool Pool::is_tiny() const {
  if (threads_ == 1) return true;
  switch (job_.op->code) {
    case KVIK_EMBED:
    case KVIK_NORM:
    case KVIK_GATHER_NORM:
    case KVIK_ROPE_STORE:
    case KVIK_ARGMAX:
      return num_items_ == 1;
    case KVIK_LINEAR:
      return job_.stage == 0 && num_items_ == 1;
    default:
      return false;
  }
}

bool Pool::next_stage() {
  if (op_index_ < 0 || ++job_.stage >= num_stages_) {
    if (++op_index_ >= num_ops_) return false;
    job_.op = &ops_[op_index_];
    job_.stage = 0;
  }
  const KvikOp& op = *job_.op;
  const KvikStep* step = job_.step;
  job_.rows = op.rows == 0 ? step->num_tokens : op.rows < 0 ? step->num_rows : op.rows;
  num_stages_ = 1;
  switch (op.code) {
    case KVIK_LINEAR:
      num_stages_ = 2;
      num_items_ = job_.stage == 0 ? plan_prepare(op) : plan_gemm(op);
      break;
    case KVIK_ATTENTION:
      num_items_ = plan_attention(op);
      break;
    case KVIK_PACK:
    case KVIK_PACK_QUANTIZED:
    case KVIK_UNPACK:
    case KVIK_UNPACK_QUANTIZED:
      num_items_ = op.linear->panels;
      break;
    case KVIK_READ:
      num_items_ = int((op.width + (1 << 17) - 1) >> 17);
      break;
    default:
      num_items_ = job_.rows;
  }
  num_units_ = num_items_;
  units_per_item_ = 1 + num_units_ / kMaxItems;
  num_items_ = (num_units_ + units_per_item_ - 1) / units_per_item_;
  return true;
}

int Pool::plan_prepare(const KvikOp& op) {
  const KvikLinear& w = *op.linear;
  int most = kernels_.rows_at_once(w), tokens = most / rows_per_token(w);
  job_.tiling = most > kMaxTile ? Tiling::whole(job_.rows, tokens) : Tiling::of(job_.rows, tokens);
  // A tile holds the words of its rows and, for int8 and int4, a scale and a sum per row and group.
  int groups = w.format == KVIK_INT8 ? 1 : w.format == KVIK_INT4 ? w.blocks : 0;
  job_.tile_bytes = (int64_t{4} * most * (kernels_.input_words(w) * w.words + 2 * groups) + 63) / 64 * 64;
  job_.activations = static_cast<uint8_t*>(activations_.get(size_t(job_.tile_bytes) * job_.tiling.tiles));
  return job_.tiling.tiles;
}

int Pool::plan_gemm(const KvikOp& op) {
  // An item is one panel and all rows: the panel stays in the second-level cache while the tiles stream by from the
  // third. Rows are cut where that cache would not hold them, or to have enough items; 4 tiles stay on a panel.
  int panels = op.linear->panels, tiles = job_.tiling.tiles, cuts = 1;
  int64_t limit = kernels_.rows_at_once(*op.linear) > kMaxTile ? kWideBytes : kTileBytes;
  if (tiles == 0) return 0;
  while (panels * cuts < kItemsPerWorker * threads_ && tiles / (cuts + 1) >= 4) ++cuts;
  while (job_.tile_bytes * ((tiles + cuts - 1) / cuts) > limit && tiles / (cuts + 1) >= 4) ++cuts;
  job_.tiles_per_item = (tiles + cuts - 1) / cuts;
  return panels * ((tiles + job_.tiles_per_item - 1) / job_.tiles_per_item);
}

int Pool::plan_attention(const KvikOp& op) {
  const KvikStep& step = *job_.step;
  int group = op.num_heads / op.num_kv_heads, items = 0, chunks = 0;
  int64_t partial = 0;
  sequences_.resize(size_t(step.num_seqs));
  for (int s = 0; s < step.num_seqs; ++s) {
    int queries = step.query_starts[s + 1] - step.query_starts[s], len = step.seq_lens[s];
    SequencePlan& plan = sequences_[size_t(s)];
    plan = SequencePlan{0, 0, 1, 0, 0, partial};
    if (queries == 1) {
      int low = op.window > 0 && len > op.window ? len - op.window : 0;
      plan.chunk = len - low > kLongContext ? 4 * kChunk : kChunk;
      plan.first_part = low / plan.chunk;
      plan.parts = (len + plan.chunk - 1) / plan.chunk - plan.first_part;
      chunks += plan.parts;
      if (plan.parts > 1) partial += int64_t{plan.parts} * op.num_heads * (op.head_dim + 2);
    } else if (queries > 1) {
      int most = kQueryRows / group > 1 ? kQueryRows / group : 1;
      plan.parts = (queries + most - 1) / most;
      plan.chunk = (queries + plan.parts - 1) / plan.parts;
    }
  }
  // All heads of a chunk in one item read memory in order; fewer where that leaves too few items to share.
  int heads = op.num_kv_heads;
  while (heads > 1 && chunks * (op.num_kv_heads / heads) < 4 * threads_) heads = heads % 2 ? 1 : heads / 2;
  for (int s = 0; s < step.num_seqs; ++s) {
    SequencePlan& plan = sequences_[size_t(s)];
    if (step.query_starts[s + 1] - step.query_starts[s] == 1) plan.heads = heads;
    plan.first_item = items;
    items += plan.parts * (op.num_kv_heads / plan.heads);
  }
  if (step.num_seqs * op.num_kv_heads > num_arrivals_) {
    num_arrivals_ = step.num_seqs * op.num_kv_heads;
    arrivals_.reset(new std::atomic<int>[size_t(num_arrivals_)]());
  }
  job_.sequences = sequences_.data();
  job_.arrivals = arrivals_.get();
  job_.partials = static_cast<float*>(partials_.get(size_t(partial) * sizeof(float)));
  return items;
}

void Pool::execute(int item, Scratch& scratch) {
  int unit = item * units_per_item_, end = num_units_ - unit < units_per_item_ ? num_units_ : unit + units_per_item_;
  for (; unit < end; ++unit) execute_unit(unit, scratch);
}

void Pool::execute_unit(int unit, Scratch& scratch) {
  const KvikOp& op = *job_.op;
  switch (op.code) {
    case KVIK_EMBED: return kernels_.embed(job_, unit, scratch);
    case KVIK_NORM:
    case KVIK_GATHER_NORM: return kernels_.norm(job_, unit, scratch);
    case KVIK_LINEAR:
      return job_.stage == 0 ? kernels_.linear_prepare(job_, unit, scratch) : kernels_.linear_gemm(job_, unit, scratch);
    case KVIK_ROPE_STORE: return kernels_.rope_store(job_, unit, scratch);
    case KVIK_ATTENTION: return kernels_.attention(job_, unit, scratch);
    case KVIK_ARGMAX: return kernels_.argmax(job_, unit, scratch);
    case KVIK_PACK: return pack_panel(op, unit);
    case KVIK_PACK_QUANTIZED: return pack_panel_quantized(op, unit);
    case KVIK_UNPACK: return unpack_panel(op, unit);
    case KVIK_UNPACK_QUANTIZED: return unpack_panel_quantized(op, unit);
    case KVIK_READ: {
      int64_t begin = int64_t{unit} << 17, left = op.width - begin;
      return kernels_.read(static_cast<const uint8_t*>(op.x) + begin, left < (1 << 17) ? left : (1 << 17));
    }
    case KVIK_PEAK: return kernels_.peak(op.type, op.width, scratch);
    default: std::abort();
  }
}

// Until the stage `phase` is over. False when a worker is to end.
bool Pool::wait(uint64_t phase, int worker) {
  int64_t idle_since = 0;
  for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
    if (spins < kSpins) {
      pause();
    } else if (phase != idle_at_.load(std::memory_order_acquire)) {
      if (pulls_) pull_the_suspended(phase, worker);
#if defined(__linux__)
      sched_yield();
#else
      std::this_thread::yield();
#endif
    } else {
      if (stop_.load()) return false;
      int64_t time = now_ns();
      if (idle_since == 0) idle_since = time;
      if (time - idle_since > spin_ns_) {
        kernels_.leave(workers_[worker].scratch);
        std::unique_lock<std::mutex> lock(sleep_mutex_);
        sleeping_.fetch_add(1);
        sleep_.wait(lock, [&] { return phase_.load() != phase || stop_.load(); });
        sleeping_.fetch_sub(1);
        if (stop_.load()) return false;
      }
      for (int i = 0; i < 32; ++i) pause();
    }
  }
  return true;
}

// Pulls those that hold items and get no processor time, while the stage `phase` lasts.
void Pool::pull_the_suspended(uint64_t phase, int worker) {
  for (int w = 0; w < threads_; ++w) {
    if (w == worker || workers_[w].waits.load(std::memory_order_relaxed)) continue;
    Placement& other = workers_[w].placement;
    int64_t before = other.cpu_time(), begin = now_ns();
    while (now_ns() - begin < kLookNs) {
      if (phase_.load(std::memory_order_acquire) != phase) return;
      pause();
    }
    if (before >= 0 && other.cpu_time() == before) other.pull();
  }
}

}  // namespace kvik

// Threads that execute a tape together, with work stealing and without waiting for whoever holds no work.
//
// A stage's items are dealt out as one contiguous range per worker; who has finished its own range takes from the
// others'. `next` of a range packs (phase tag, index, end) in one word, so taking an item from a stage that is already
// over fails by itself: a worker that the operating system suspended between two items delays nobody, and one that it
// suspended within an item is pulled to the processor of whoever waits for it (placement.hpp).
//
//     range of worker w    | tag: 24 bits | index: 20 | end: 20 |       compare-and-swap index -> index + 1
//     remaining            items not yet finished; whoever finishes the last one sets up the next stage and goes on
//
// Between runs workers spin for a short while and then sleep on a condition variable.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels.hpp"
#include "placement.hpp"

namespace kvik {

class Pool {
 public:
  Pool(int threads, int isa, const int32_t* cores, int64_t spin_ns);  // throws where the system has no more threads
  ~Pool();
  void run(const KvikOp* ops, int num_ops, const KvikStep* step);
  void profile(double* seconds);

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> next{0};
  };
  struct alignas(64) Worker {
    Scratch scratch;
    std::thread thread;
    Placement placement;
    std::atomic<bool> waits{true};  // it holds nothing that others wait for
  };

  void end_threads();
  void work(int worker);        // take and do items until the run ends (caller) or for ever (others)
  int take(uint64_t phase, int worker);
  void execute(int item, Scratch& scratch);
  void execute_unit(int unit, Scratch& scratch);
  void advance(Scratch& scratch);  // only by the worker that finished a stage (or starts the run)
  bool next_stage();
  int plan_prepare(const KvikOp& op);
  int plan_gemm(const KvikOp& op);
  int plan_attention(const KvikOp& op);
  bool is_tiny() const;
  void publish(int items);
  bool wait(uint64_t phase, int worker);
  void pull_the_suspended(uint64_t phase, int worker);
  void pin(int worker) const;

  const int threads_;
  const Kernels& kernels_;
  std::vector<int32_t> cores_;
  const int64_t spin_ns_;
  const bool pulls_;  // with more workers than processors somebody is always suspended, and pulling only moves them
  std::unique_ptr<Range[]> ranges_;
  std::unique_ptr<Worker[]> workers_;

  alignas(64) std::atomic<uint64_t> phase_{1};  // grows by one per published stage and once more at the end of a run
  std::atomic<uint64_t> idle_at_{1};            // the phase that ended the last run: nothing to do while it lasts
  alignas(64) std::atomic<int> remaining_{0};

  // Owned by whoever advances; stable while a stage's items are being done.
  const KvikOp* ops_ = nullptr;
  int num_ops_ = 0, op_index_ = -1, num_items_ = 0, num_stages_ = 0;
  int num_units_ = 0, units_per_item_ = 1;  // what kernels count; an item is more than one where a range would overflow
  Job job_;
  Scratch activations_, partials_;
  std::vector<SequencePlan> sequences_;
  std::unique_ptr<std::atomic<int>[]> arrivals_;
  int num_arrivals_ = 0;
  bool profiling_ = false;
  int64_t stage_begin_ = 0;
  double seconds_[KVIK_OP_COUNT] = {};

  std::mutex run_mutex_, sleep_mutex_;
  std::condition_variable sleep_;
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false};
};

}  // namespace kvik

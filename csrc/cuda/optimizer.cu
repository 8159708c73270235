// Steps of Adam (AdamW, amsgrad) and SGD with the penalty inside: every operand is moved once.
//
// Bytes an element, all operands float: Adam reads g, theta, m, v and writes theta, m, v: 28, and 8
// more with springs (F, a): 36, where the penalty and then the optimizer take 20 + 28. amsgrad 8
// more, a path 8 more. SGD 12, with momentum 8 more, with springs 8 more. Parameters and gradients
// of 16 bits save 6; with a master copy they save none, as theta is read and written there. A
// bfloat16 Fisher saves 2, moments of 16 bits 4 each. Adam's loop for floats has some 220
// instructions an element, two divisions, a root and both sides of all branches counted; an H200
// can issue 250 while it moves 36 bytes.
#include <cmath>

#include "fused_step.cuh"
#include "multi_tensor.cuh"

namespace ewc_fast::cuda {
namespace {

// Calls visit(dtype of the parameters, of the Fisher, of the moments, types) for every instance.
template <class Visit>
void for_each_step_types(Visit visit) {
  using bf16 = __nv_bfloat16;
  constexpr DType f32 = DType::float32, b16 = DType::bfloat16, f16 = DType::float16;
  visit(f32, f32, f32, StepTypes<float, float, float>{});
  visit(DType::float64, DType::float64, DType::float64, StepTypes<double, double, double>{});
  visit(f32, b16, f32, StepTypes<float, bf16, float>{});
  visit(b16, f32, f32, StepTypes<bf16, float, float>{});
  visit(b16, b16, f32, StepTypes<bf16, bf16, float>{});
  visit(b16, f32, b16, StepTypes<bf16, float, bf16>{});
  visit(b16, b16, b16, StepTypes<bf16, bf16, bf16>{});
  visit(f16, f32, f32, StepTypes<__half, float, float>{});
  visit(f16, b16, f32, StepTypes<__half, bf16, float>{});
  visit(f16, f32, f16, StepTypes<__half, float, __half>{});
  visit(f16, b16, f16, StepTypes<__half, bf16, __half>{});
}

// What the optimizers are made of on the host.
template <class Options>
struct StepSettings {
  Options options;
  DeviceNumber lr;
  const AdamStep<double>* coefficients = nullptr;  // by the rows' ordinals
};

// 80 registers (128 of double) hold a step of one thread; aiming at four blocks, ptxas spilled.
// Three blocks have 3 * 256 * 112 bytes of loads on their way, where an H200 needs some 30 KB to
// keep its memory busy. Doubles with a path need more than 128 registers: on sm_100 two blocks made
// Adam spill.
template <class C, bool Path>
constexpr int kStepBlocks = sizeof(C) == 4 ? 3
                            : Path         ? 1
                                           : 2;

template <class Types, bool Path>
struct Adam {
  using C = typename Types::C;
  using Sum = C;
  using Row = StepRow<Types, 3, Path>;
  static constexpr int kOperands = kStepCount;
  static constexpr int kPack = kPackOf<typename Types::T, typename Types::M, C>;
  static constexpr int kResident = kStepBlocks<C, Path>;

  Around<C> around;
  double ewc_lambda;
  LearningRate lr;
  const AdamStep<double>* coefficients;
  AdamUpdate<C> update{};

  explicit Adam(const StepSettings<AdamOptions>& settings)
      : around(settings.options),
        ewc_lambda(settings.options.ewc_lambda),
        lr{settings.options.lr, settings.lr},
        coefficients(settings.coefficients) {}

  Row row(const ewc_fast::Row& row, std::uint32_t seed) const {
    Row made = step_row<Row>(row, seed);
    made.coefficients = coefficients + row.ordinal;
    return made;
  }
  __device__ void begin(const Row& row) {
    const AdamStep<double> step = *row.coefficients;
    update = {rounded<C>(step), row.moments[2] != nullptr};
    around.strength = static_cast<C>(lr() * ewc_lambda);
  }
  template <class Access>
  __device__ void step(const Row& row, Access access, Sum& sum) const {
    around.step(row, access, update, sum);
  }
};

template <class Types, bool Path>
struct Sgd {
  using C = typename Types::C;
  using Sum = C;
  using Row = StepRow<Types, 1, Path>;
  static constexpr int kOperands = kStepCount;
  static constexpr int kPack = kPackOf<typename Types::T, typename Types::M, C>;
  static constexpr int kResident = kStepBlocks<C, Path>;

  Around<C> around;
  double ewc_lambda;
  LearningRate lr;
  SgdUpdate<C> update;

  explicit Sgd(const StepSettings<SgdOptions>& settings)
      : around(settings.options),
        ewc_lambda(settings.options.ewc_lambda),
        lr{settings.options.lr, settings.lr},
        update{sgd_step_of<C>(settings.options), false} {}

  static Row row(const ewc_fast::Row& row, std::uint32_t seed) { return step_row<Row>(row, seed); }
  __device__ void begin(const Row& row) {
    update.momentum = row.moments[0] != nullptr;
    update.step.lr = static_cast<C>(lr());
    around.strength = static_cast<C>(lr() * ewc_lambda);
  }
  template <class Access>
  __device__ void step(const Row& row, Access access, Sum& sum) const {
    around.step(row, access, update, sum);
  }
};

// Adam's counts of steps go up by one, each in one thread before all else, which also computes what
// depends on it: powers and roots in double, once a row and not once a thread.
struct Counts {
  static constexpr int kMost = 2000;
  float* count[kMost];
  AdamStep<double>* coefficients[kMost];
  std::int32_t rows;
};
static_assert(sizeof(Counts) + sizeof(AdamOptions) + sizeof(LearningRate) <= kParameterBytes);

__global__ void __launch_bounds__(kThreads)
    count_step(const Counts __grid_constant__ counts, const AdamOptions options,
               const LearningRate lr) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= counts.rows) return;
  const float count = *counts.count[row] + 1;
  *counts.count[row] = count;
  AdamOptions now = options;
  now.lr = lr();
  *counts.coefficients[row] =
      adam_step_of<double>(now, pow(options.beta1, count), pow(options.beta2, count));
}

void count_steps(const Table& table, Run run, const StepSettings<AdamOptions>& settings,
                 AdamStep<double>* coefficients) {
  const LearningRate lr{settings.options.lr, settings.lr};
  Counts counts;
  for (std::size_t begin = 0; begin < table.rows.size(); begin += Counts::kMost) {
    const std::size_t end = std::min(table.rows.size(), begin + Counts::kMost);
    counts.rows = static_cast<std::int32_t>(end - begin);
    for (std::size_t i = begin; i < end; ++i) {
      counts.count[i - begin] = table.rows[i].at<float>(kStepCount, 0);
      counts.coefficients[i - begin] = coefficients + table.rows[i].ordinal;
    }
    const Grid grid{(counts.rows + kThreads - 1) / kThreads, kThreads,
                    static_cast<cudaStream_t>(run.stream)};
    launch_kernel("count_step", count_step, grid, counts, settings.options, lr);
  }
}

DType moments_of(const Row& row) {
  if (row.data[kStepFirst] != nullptr) return row.moments;
  return row.dtype == DType::float64 ? DType::float64 : DType::float32;
}

// Launches the step over the rows of every combination of dtypes; leaves the penalty, where there
// are springs, in run.memory[0].
template <template <class, bool> class Optimizer, class Settings>
void launch_steps(const char* name, const Table& table, Run run, const Settings& settings) {
  const bool springs = std::any_of(table.rows.begin(), table.rows.end(),
                                   [](const Row& row) { return row.data[kStepFisher] != nullptr; });
  double* const partial = springs ? run.memory + 1 : nullptr;
  run.seed = settings.options.seed;
  std::int64_t blocks = 0;
  for_each_step_types([&](DType param, DType fisher, DType moments, auto types) {
    const auto launch = [&](auto path) {
      const auto belongs = [&](const Row& row) {
        return row.dtype == param && moments_of(row) == moments &&
               (row.fisher == DType::bfloat16) == (fisher == DType::bfloat16) &&
               (row.data[kStepPath] != nullptr) == path;
      };
      const Optimizer<decltype(types), decltype(path)::value> op(settings);
      blocks += launch_instance(name, table, op, run, after(partial, blocks), belongs);
    };
    launch(std::false_type{});
    launch(std::true_type{});
  });
  if (springs) sum_blocks(run, blocks, 0.5);
}

AdamStep<double>* coefficients_in(const Table& table, Run run) {
  return reinterpret_cast<AdamStep<double>*>(run.memory + memory_needed(table));
}

}  // namespace

std::int64_t step_memory_needed(const Table& table) {
  std::int64_t rows = 0;
  for (const Row& row : table.rows) rows = std::max(rows, row.ordinal + 1);
  return memory_needed(table) + rows * static_cast<std::int64_t>(sizeof(AdamStep<double>) / 8);
}

void adam_step(const Table& table, Run run, const AdamOptions& options, DeviceNumber lr) {
  const DeviceGuard guard(device_of(table));
  AdamStep<double>* const coefficients = coefficients_in(table, run);
  const StepSettings<AdamOptions> settings{options, lr, coefficients};
  count_steps(table, run, settings, coefficients);
  launch_steps<Adam>("adam_step", table, run, settings);
}

void sgd_step(const Table& table, Run run, const SgdOptions& options, DeviceNumber lr) {
  const DeviceGuard guard(device_of(table));
  launch_steps<Sgd>("sgd_step", table, run, StepSettings<SgdOptions>{options, lr});
}

}  // namespace ewc_fast::cuda

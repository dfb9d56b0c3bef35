// Runs the small kernels and compares with the same sums done in a loop. `selftest` lists the cases, `selftest CASE`
// runs one and exits with 1, and a message, when a value is wrong or a launch fails. SIMT_SCHEDULE chooses the order.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "simt/control.h"

namespace {

using namespace selftest;

[[noreturn]] void quit(const std::string& why) {
  std::printf("%s\n", why.c_str());
  std::exit(1);
}

void expect(bool condition, const std::string& what) {
  if (!condition) quit(what);
}

void run(cudaError_t error) {
  simt_synchronize();
  if (error != cudaSuccess) quit(cudaGetErrorString(error));
}

// A launch that must be refused, with a message that names what was wrong.
void refuse(cudaError_t error, cudaError_t expected, const char* message) {
  const std::string text = cudaGetErrorString(error);
  expect(error == expected && error == cudaPeekAtLastError(), "error " + std::to_string(error) + ": " + text);
  expect(text.find(message) != std::string::npos && text == simt_last_error(), "unexpected message: " + text);
  expect(cudaGetLastError() == expected && cudaGetLastError() == cudaSuccess, "the last error is taken once");
}

// Small integers, so that every sum is exact and values tie often.
std::vector<int> numbers(int n, int below) {
  std::vector<int> x(n);
  unsigned state = 12345;
  for (int& value : x) value = static_cast<int>((state = state * 1664525u + 1013904223u) >> 16) % below;
  return x;
}

std::vector<float> floats(int n, int below) {
  const std::vector<int> x = numbers(n, below);
  return {x.begin(), x.end()};
}

void test_row_sums() {
  const int rows = 5, columns = 300;
  const std::vector<float> x = floats(rows * columns, 100);
  std::vector<float> sums(rows, NAN);
  run(row_sums(x.data(), sums.data(), rows, columns));
  for (int row = 0; row < rows; ++row) {
    const float* begin = x.data() + row * columns;
    expect(sums[row] == std::accumulate(begin, begin + columns, 0.0f), "row_sums: wrong sum");
  }
}

void test_row_tops() {
  const int rows = 7, columns = 500;
  const std::vector<float> x = floats(rows * columns, 20);  // some 25 ties for the maximum of a row
  std::vector<Top> tops(rows, {NAN, NAN, -1});
  run(row_tops(x.data(), tops.data(), rows, columns, 2));
  for (int row = 0; row < rows; ++row) {
    const float* begin = x.data() + row * columns;
    const float* max = std::max_element(begin, begin + columns);
    double sum = 0.0;
    for (int i = 0; i < columns; ++i) sum += std::exp(static_cast<double>(begin[i]) - static_cast<double>(*max));
    expect(tops[row].max == *max, "row_tops: wrong maximum");
    expect(tops[row].index == max - begin, "row_tops: wrong index");
    expect(std::abs(tops[row].sum - sum) < 1e-5 * sum, "row_tops: wrong sum");
  }
}

void test_sort_rows() {
  const int rows = 3;
  std::vector<uint64_t> keys(rows * kSortSize), sorted(keys.size(), ~uint64_t{0});
  uint64_t state = 1;
  for (uint64_t& key : keys) key = (state = state * 6364136223846793005u + 1442695040888963407u) >> 8;
  run(sort_rows(keys.data(), sorted.data(), rows));
  for (int row = 0; row < rows; ++row) std::sort(&keys[row * kSortSize], keys.data() + (row + 1) * kSortSize);
  expect(sorted == keys, "sort_rows: wrong order");
}

void test_histogram() {
  const int n = 1000, bins = 50;
  const std::vector<int> x = numbers(n, bins);
  std::vector<unsigned> counts(bins, 0), expected(bins, 0);
  std::vector<unsigned long long> extremes = {0, 0, ~0ull}, keys;
  run(histogram(x.data(), counts.data(), extremes.data(), n, bins));
  for (int i = 0; i < n; ++i) {
    ++expected[x[i]];
    keys.push_back(static_cast<unsigned long long>(x[i]) << 32 | static_cast<unsigned>(i));
  }
  const auto [min, max] = std::minmax_element(keys.begin(), keys.end());
  expect(counts == expected, "histogram: wrong counts");
  expect(extremes[0] == *max && extremes[1] == *max && extremes[2] == *min, "histogram: wrong extremes");
}

void test_suffix_sums() {
  const int n = 64 + 45;  // the last block has a full warp, one of 13 lanes, and threads that exit at once
  const std::vector<int> x = numbers(n, 1000);
  std::vector<int> sums(n, -1);
  run(suffix_sums(x.data(), sums.data(), n));
  for (int i = 0; i < n; ++i) {
    const int end = std::min(n, i - i % 8 + 8);
    expect(sums[i] == std::accumulate(x.begin() + i, x.begin() + end, 0), "suffix_sums: wrong sum");
  }
}

void test_votes() {
  std::vector<int> x = numbers(32, 100);
  for (int i = 0; i < 32; ++i) x[i] -= i % 3 == 0 ? 50 : 0;
  std::vector<unsigned> out(12, 12345);
  run(votes(x.data(), out.data()));
  std::vector<unsigned> expected(12, 0);
  const auto [min, max] = std::minmax_element(x.begin(), x.end());
  const std::vector<unsigned> u(x.begin(), x.end());
  const auto [unsigned_min, unsigned_max] = std::minmax_element(u.begin(), u.end());
  expected[1] = *max > 90;
  expected[2] = *min > 90;
  expected[4] = static_cast<unsigned>(*min);
  expected[5] = static_cast<unsigned>(*max);
  expected[6] = *unsigned_min;
  expected[7] = *unsigned_max;
  expected[9] = ~0u;
  for (int i = 0; i < 32; ++i) {
    expected[0] |= static_cast<unsigned>(x[i] % 2 == 0) << i;
    expected[3] += u[i];
    expected[8] |= u[i];
    expected[9] &= u[i];
    expected[10] ^= u[i];
    expected[11] += x[i] % 2 == 0 ? u[i] : 0;
  }
  expect(out == expected, "votes: wrong");
}

void test_double_all() {
  const int n = 200;
  const std::vector<float> x = floats(n, 1000);
  std::vector<float> y(n, NAN);
  run(double_all(x.data(), y.data(), n));
  for (int i = 0; i < n; ++i) expect(y[i] == 2 * x[i], "double_all: wrong");
}

void test_flat_indices() {
  const dim3 grid(2, 3, 2), block(5, 3, 4);
  std::vector<int> out(2 * 3 * 2 * 5 * 3 * 4, -1), expected(out.size());
  std::iota(expected.begin(), expected.end(), 0);
  run(flat_indices(out.data(), grid, block));
  expect(out == expected, "flat_indices: wrong");
  expect(simt_launch(0) == std::string("selftest::(anonymous namespace)::flat_indices_kernel(int*) grid=2,3,2 "
                                       "block=5,3,4 dynamic=0 static=0 programmatic=0"),
         std::string("unexpected record: ") + simt_launch(0));
}

void test_reverse() {
  std::vector<int> x = numbers(100, 1000), y(100, -1);
  run(reverse(x.data(), y.data(), 100));
  std::reverse(x.begin(), x.end());
  expect(x == y, "reverse: wrong");
}

void test_squares_then_sums() {
  const unsigned long long before = simt_launches();
  std::vector<int> squares(96, -1), sums(3, -1);
  run(squares_then_sums(squares.data(), sums.data(), 3));
  for (int block = 0; block < 3; ++block) {
    int sum = 0;
    for (int i = 32 * block; i < 32 * (block + 1); ++i) sum += i * i;
    expect(sums[block] == sum, "squares_then_sums: wrong");
  }
  expect(simt_launches() == before + 2, "two launches are counted");
  expect(std::strstr(simt_launch(1), "squares_kernel") && std::strstr(simt_launch(0), "programmatic=1"), "records");
}

void test_refusals() {
  std::vector<int> x = {3, 2, 0, 4};
  refuse(expect_positive(x.data(), 4), cudaErrorLaunchFailure, "thread 2 (warp 0, lane 2)");
  refuse(expect_positive(x.data(), 4), cudaErrorLaunchFailure, "assertion failed: x[threadIdx.x] > 0");
  run(expect_positive(x.data(), 2));  // a launch that failed leaves nothing behind
  refuse(greedy(x.data()), cudaErrorLaunchFailure, "shared variable 'last' makes it 49156 bytes");
  refuse(nothing(dim3(0), dim3(32), 0, nullptr, 0), cudaErrorInvalidConfiguration, "grid 0,1,1");
  refuse(nothing(dim3(1, 65536), dim3(32), 0, nullptr, 0), cudaErrorInvalidConfiguration, "grid too large");
  refuse(nothing(dim3(1), dim3(0), 0, nullptr, 0), cudaErrorInvalidConfiguration, "block 0,1,1");
  refuse(nothing(dim3(1), dim3(33, 32), 0, nullptr, 0), cudaErrorInvalidConfiguration, "block too large");
  refuse(nothing(dim3(1), dim3(1, 1, 65), 0, nullptr, 0), cudaErrorInvalidConfiguration, "block too large");
  refuse(nothing(dim3(1), dim3(1), 49153, nullptr, 0), cudaErrorInvalidValue, "the launch asks for 49153");
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  refuse(nothing(dim3(1), dim3(1), 0, &cluster, 1), cudaErrorNotSupported, "launch attribute 4");
  int value = 0;
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 1, "one");
  simt_multiprocessors(7);
  expect(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 7, "seven");
  refuse(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 1), cudaErrorInvalidDevice, "one device");
  expect(simt_schedule("sideways") == 1 && simt_schedule("random:") == 1 && simt_schedule("random:1x") == 1, "parsed");
  expect(simt_schedule("random:18") == 0 && simt_schedule("mixed:1") == 0, "not parsed");
  for (const char* schedule : {"[schedule forward]", "[schedule reverse]", "[schedule random:3]"}) {
    refuse(expect_positive(x.data(), 4), cudaErrorLaunchFailure, schedule);
  }
}

void test_host_threads() {
  std::vector<std::thread> hosts;
  for (int i = 0; i < 3; ++i) {
    hosts.emplace_back([] {
      test_row_sums();
      test_suffix_sums();
    });
  }
  for (std::thread& host : hosts) host.join();
}

struct Case {
  const char* name;
  void (*run)();
};
constexpr Case kCases[] = {
    {"row_sums", test_row_sums},         {"row_tops", test_row_tops},
    {"sort_rows", test_sort_rows},       {"histogram", test_histogram},
    {"suffix_sums", test_suffix_sums},   {"votes", test_votes},
    {"double_all", test_double_all},     {"reverse", test_reverse},
    {"flat_indices", test_flat_indices}, {"squares_then_sums", test_squares_then_sums},
    {"refusals", test_refusals},         {"host_threads", test_host_threads},
};

}  // namespace

int main(int argc, char** argv) {
  bool found = argc < 2;
  for (const Case& each : kCases) {
    if (argc < 2) std::printf("%s\n", each.name);
    for (int i = 1; i < argc; ++i) {
      if (std::strcmp(argv[i], each.name) != 0) continue;
      each.run();
      found = true;
    }
  }
  expect(found, "no such case");
}

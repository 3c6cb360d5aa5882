// The plan of a step's attention: the work list that cuda/plan.py makes in numpy, which says how and why, number by number the same.
// Numpy takes a microsecond or two for each of its sixty calls, which a device may wait for; this takes less than ten for all.
//
// Nothing of a C++ library is called, so that it runs wherever the processor does.
#include <cstdint>

namespace {

constexpr int HEADER_WORDS = 8, WORDS = 8, DECODE_ROWS = 16, TILE_BITS = 6, LEAST_TILES = 4, WAVES = 4;
constexpr double TOLERANCE = 1.0 / 16;

struct Planner {  // PlannerStructure of native_plan.py
  int32_t group, prompt_rows, slots, max_parts, head_rows;
};

struct Item {  // of attention.cuh; of a merge, `begin` is the number of parts
  int32_t request, head_rows, first_row, num_rows, begin, end, partial_row, is_prompt;
};
static_assert(sizeof(Item) == WORDS * sizeof(int32_t));

int min(int a, int b) { return a < b ? a : b; }
int max(int a, int b) { return a > b ? a : b; }
uint32_t ceil_div(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
int tiles_of(const Item& item) { return (item.end - item.begin + (1 << TILE_BITS) - 1) >> TILE_BITS; }

// Whole units in the order of requests; `window` 0: all tokens are seen. How many there are.
int make_units(const Planner& planner, const int32_t* seq_lens, const int32_t* cu_seqlens_q, int num_requests,
               int window, Item* units) {
  int count = 0;
  for (int request = 0; request < num_requests; request++) {
    const int num_new = cu_seqlens_q[request + 1] - cu_seqlens_q[request], past = seq_lens[request] - num_new;
    for (int first = 0; first < num_new * planner.group; first += planner.prompt_rows) {
      const int rows = min(num_new * planner.group - first, planner.prompt_rows);
      const int begin = window ? max(past + first / planner.group - (window - 1), 0) / 16 * 16 : 0;
      const int end = past + (first + rows - 1) / planner.group + 1;
      units[count++] = {request, planner.head_rows, first, rows, begin, end, -1, rows > DECODE_ROWS};
    }
  }
  return count;
}

// Those of as many tiles stay in their order. `places`: a number for each count of tiles that there may be, and one more.
void sort_longest_first(const Item* items, int count, Item* sorted, int32_t* places) {
  int longest = 0;
  for (int i = 0; i < count; i++) longest = max(longest, tiles_of(items[i]));
  for (int tiles = 0; tiles <= longest + 1; tiles++) places[tiles] = 0;
  for (int i = 0; i < count; i++) places[longest - tiles_of(items[i]) + 1]++;
  for (int place = 1; place <= longest; place++) places[place] += places[place - 1];
  for (int i = 0; i < count; i++) sorted[places[longest - tiles_of(items[i])]++] = items[i];
}

// Parts of a unit where the longest, of `longest` tiles, has `count`.
int parts_of(int tiles, int longest, int count) { return ceil_div(uint32_t(tiles) * count, longest); }

// When the last part ends where all places take one after the other, in tiles: of the parts that are longer than half of the longest,
// since others fit a gap beside one.
double end_of(const Item* units, int num_units, int longest, int count, int slots) {
  int num_long = 0;
  for (int i = 0; i < num_units; i++) {
    const int tiles = tiles_of(units[i]);
    if (uint32_t(tiles) * count * 2 <= uint32_t(longest)) break;
    num_long += parts_of(tiles, longest, count);
  }
  return double(ceil_div(num_long, slots)) * ceil_div(longest, count);
}

bool fits(const Planner& planner, const Item* units, int num_units, int longest, int count) {
  int64_t parts = 0, rows = 0;
  for (int i = 0; i < num_units && tiles_of(units[i]) * int64_t(count) > longest; i++) {
    const int of_unit = parts_of(tiles_of(units[i]), longest, count);
    parts += of_unit;
    rows += int64_t(of_unit) * units[i].num_rows;
  }
  return parts <= planner.max_parts && rows <= planner.head_rows;
}

// Into how many parts to cut the longest unit, and the others into such as are no longer; 1: nothing is cut.
int choose_parts(const Planner& planner, const Item* units, int num_units, int64_t total) {
  const int longest = tiles_of(units[0]), share = int(int64_t(longest) * planner.slots / total);
  const int most = min(max(1, longest / LEAST_TILES), max(5, 3 * share + 1));
  const int tried[] = {1, 2, 3, 4, 5, share, share + 1, 2 * share + 1, 3 * share + 1};
  int counts[9], num_counts = 0;
  double ends[9], least = double(total) / planner.slots, earliest = 0;
  for (const int count : tried) {
    if (count > most || (num_counts && count <= counts[num_counts - 1])) continue;
    const double end = end_of(units, num_units, longest, count, planner.slots);
    counts[num_counts] = count;
    ends[num_counts] = end > least ? end : least;
    num_counts++;
  }
  for (uint32_t left_out = 0;;) {
    bool any = false;
    for (int i = 0; i < num_counts; i++) {
      if (left_out >> i & 1 || (any && ends[i] >= earliest)) continue;
      earliest = ends[i];
      any = true;
    }
    int best = 0;
    while (left_out >> best & 1 || ends[best] > earliest * (1 + TOLERANCE)) best++;
    if (fits(planner, units, num_units, longest, counts[best])) return counts[best];  // as one part of each does
    left_out |= 1u << best;
  }
}

// Units, the longest first, of which the first ones are cut; `items` get parts, then the units that stay whole. How many parts and
// merges there are.
struct Cut {
  int num_parts, num_merges;
};
Cut cut(const Item* units, int num_units, int count, Item* items, Item* merges) {
  const int longest = tiles_of(units[0]);
  int num_parts = 0, num_merges = 0, partial_row = 0;
  for (; num_merges < num_units; num_merges++) {
    const Item& unit = units[num_merges];
    const int tiles = tiles_of(unit);
    if (tiles * int64_t(count) <= longest) break;
    const int length = ceil_div(tiles, parts_of(tiles, longest, count)), parts = ceil_div(tiles, length);
    for (int part = 0; part < parts; part++) {
      Item& item = items[num_parts++] = unit;
      item.begin = unit.begin + part * (length << TILE_BITS);
      item.end = min(item.begin + (length << TILE_BITS), unit.end);
      item.partial_row = partial_row;
      partial_row += unit.num_rows;
    }
    merges[num_merges] = items[num_parts - parts];
    merges[num_merges].begin = parts;
  }
  for (int i = num_merges; i < num_units; i++) items[num_parts + i - num_merges] = units[i];
  return {num_parts, num_merges};
}

}  // namespace

extern "C" {

// Header, items and merges of a step into `words`, as the kernels read them, of which `max_items` have room. `scratch`: room for as many
// items, then for a number for each 64 tokens of the longest request and two more.
void evenhand_plan(const Planner* planner, const int32_t* seq_lens, const int32_t* cu_seqlens_q, int32_t num_requests,
                   int32_t window, int32_t max_items, int32_t* words, int32_t* scratch) {
  Item* items = reinterpret_cast<Item*>(words + HEADER_WORDS);
  Item* unsorted = reinterpret_cast<Item*>(scratch);
  int32_t* places = scratch + int64_t(max_items) * WORDS;
  int num_items = make_units(*planner, seq_lens, cu_seqlens_q, num_requests, window, unsorted), num_merges = 0;
  sort_longest_first(unsorted, num_items, items, places);
  int64_t total = 0;
  for (int i = 0; i < num_items; i++) total += tiles_of(items[i]);
  if (num_items && int64_t(tiles_of(items[0])) * WAVES * planner->slots > total) {
    const int count = choose_parts(*planner, items, num_items, total);
    if (count > 1) {
      const Cut done = cut(items, num_items, count, unsorted, items + max_items);
      num_items += done.num_parts - done.num_merges;
      num_merges = done.num_merges;
      sort_longest_first(unsorted, num_items, items, places);
    }
  }
  words[0] = num_items;
  words[1] = num_merges;
}
}

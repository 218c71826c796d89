#include "augment/augment_params.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "augment/augment_maps.h"
#include "augment/augment_random.h"
#include "augment/elementary.h"

namespace fusereg::augment::params {
namespace {

// --- geometry ---

struct Range {
  std::int64_t low = 0;
  std::int64_t high = 0;
};

// Where a window may start along one axis.
Range starts(std::int64_t canvas, std::int64_t window, std::int64_t before, std::int64_t after,
             double larger) {
  if (larger == 2.0)
    return {std::min<std::int64_t>(0, canvas - window), std::max<std::int64_t>(0, canvas - window)};
  const std::int64_t lacking = window - (canvas + before + after);
  if (lacking > 0 && larger == 1.0) {
    before += lacking;
    after += lacking;
  }
  return {-before, canvas + after - window};
}

std::int64_t whole(double value) { return static_cast<std::int64_t>(value); }

// The size of a window; without one of its own, that of the canvas with its margins.
Size window_size(const Step& step, const Size& canvas) {
  const std::vector<double>& v = step.values;
  if (v[0] > 0.0) return {whole(v[0]), whole(v[1])};
  return {canvas.height + whole(v[3]) + whole(v[5]), canvas.width + whole(v[2]) + whole(v[4])};
}

Range window_starts_x(const Step& step, const Size& canvas) {
  const std::vector<double>& v = step.values;
  return starts(canvas.width, window_size(step, canvas).width, whole(v[2]), whole(v[4]), v[6]);
}

Range window_starts_y(const Step& step, const Size& canvas) {
  const std::vector<double>& v = step.values;
  return starts(canvas.height, window_size(step, canvas).height, whole(v[3]), whole(v[5]), v[6]);
}

// The widest that a canvas of `along` by `across` becomes, turned by `from` to `to` degrees:
// |along cos| + |across sin|, which rises up to the angle at which the diagonal lies level.
double widest(double along, double across, double from, double to) {
  const double level = std::atan2(across, along) * (180.0 / 3.14159265358979323846);
  for (const double peak : {level, 180.0 - level}) {
    if (peak + 180.0 * std::ceil((from - peak) / 180.0) <= to)
      return std::sqrt(along * along + across * across);
  }
  auto at = [&](double angle) {
    double sine = 0.0, cosine = 1.0;
    sine_cosine(angle, sine, cosine);
    return along * std::fabs(cosine) + across * std::fabs(sine);
  };
  return std::max(at(from), at(to));
}

Size room_size(const Step& step, const Size& canvas) {
  const auto width = static_cast<double>(canvas.width);
  const auto height = static_cast<double>(canvas.height);
  const double from = step.values[0];
  const double to = step.values[1];
  constexpr double kRounding = 1e-4;  // what a sum's rounding adds is no pixel
  return {whole(std::ceil(widest(height, width, from, to) - kRounding)),
          whole(std::ceil(widest(width, height, from, to) - kRounding))};
}

// torchvision's Resize of one number, and RandomResize: quotients are cut off.
Size side_size(const Step& step, const Size& canvas, const Source& source) {
  const std::int64_t from = whole(step.values[0]);
  const std::int64_t to = whole(step.values[1]);
  const auto longest = static_cast<double>(whole(step.values[2]));
  const auto width = static_cast<double>(canvas.width);
  const auto height = static_cast<double>(canvas.height);
  const double small = std::min(width, height);
  const double large = std::max(width, height);
  auto side = static_cast<double>(from);
  if (from != to) {
    const PhiloxWords words = source.words(Operation::kCrop, step.occurrence);
    side = static_cast<double>(from + choice(words.word[0], to - from + 1));
  }
  double other = std::floor(side * large / small);
  if (from == 0 || (longest > 0.0 && other > longest)) {
    side = std::floor((from == 0 ? longest * small : longest * side) / (from == 0 ? large : other));
    other = longest;
  }
  const std::int64_t a = std::max<std::int64_t>(whole(side), 1);
  const std::int64_t b = std::max<std::int64_t>(whole(other), 1);
  return canvas.height <= canvas.width ? Size{a, b} : Size{b, a};
}

// The factor of both sides: torchvision's RandomShortestSize, and ScaleJitter in float32 as there.
double drawn_factor(const Step& step, const Size& canvas, const Source& source) {
  const std::vector<double>& v = step.values;
  const auto width = static_cast<double>(canvas.width);
  const auto height = static_cast<double>(canvas.height);
  const PhiloxWords words = source.words(Operation::kCrop, step.occurrence);
  if (step.kind == StepKind::kJitter) {
    const float scale = static_cast<float>(v[2]) + static_cast<float>(words.word[0] >> 8) *
                                                       0x1p-24f * static_cast<float>(v[3] - v[2]);
    return static_cast<float>(std::min(v[0] / height, v[1] / width)) * scale;
  }
  const double side = v[0] + v[1] * static_cast<double>(choice(words.word[0], whole(v[2])));
  const double factor = side / std::min(width, height);
  return v[3] > 0.0 ? std::min(factor, v[3] / std::max(width, height)) : factor;
}

Size factor_size(const Step& step, const Size& canvas, const Source& source) {
  const double factor = drawn_factor(step, canvas, source);
  auto times = [&](std::int64_t side) {
    const std::int64_t cut = step.kind == StepKind::kJitter
                                 ? whole(static_cast<float>(side) * static_cast<float>(factor))
                                 : whole(static_cast<double>(side) * factor);
    return std::max<std::int64_t>(cut, 1);
  };
  return {times(canvas.height), times(canvas.width)};
}

// --- one sample ---

struct Sample {
  const Source& source;
  double* record;
  double* draws;
  Size canvas;
  Map map;

  void window(double x0, double y0, double x1, double y1) {
    const double box[] = {x0, y0, x1, y1};
    std::memcpy(draws + 9, box, sizeof box);
  }
};

void affine(const Step& step, Sample& s) {
  const std::vector<double>& v = step.values;
  const std::uint32_t o = step.occurrence;
  if (v[0] < 1.0 && !happens(s.source.words(Operation::kAffineChance, o).word[0], v[0])) return;
  const double angle = between(s.source.words(Operation::kRotation, o).word[0], v[1], v[2]) * v[3];
  const PhiloxWords scale = s.source.words(Operation::kScale, o);
  const double scale_x = between(scale.word[0], v[4], v[5]);
  const double scale_y = v[8] != 0.0 ? scale_x : between(scale.word[1], v[6], v[7]);
  const double inverse_x = v[9] != 0.0 ? scale_x : 1.0 / scale_x;
  const double inverse_y = v[9] != 0.0 ? scale_y : 1.0 / scale_y;
  const PhiloxWords move = s.source.words(Operation::kTranslation, o);
  const auto width = static_cast<double>(s.canvas.width);
  const auto height = static_cast<double>(s.canvas.height);
  double move_x = between(move.word[0], v[10] * width, v[11] * width);
  double move_y = between(move.word[1], v[12] * height, v[13] * height);
  if (v[14] != 0.0) {
    move_x = static_cast<double>(to_nearest(move_x));
    move_y = static_cast<double>(to_nearest(move_y));
  }
  double shear_x = v[15];
  double shear_y = v[17];
  if (v[15] != v[16] || v[17] != v[18]) {
    const PhiloxWords shear = s.source.words(Operation::kShear, o);
    shear_x = between(shear.word[0], v[15], v[16]);
    shear_y = between(shear.word[1], v[17], v[18]);
  }
  const double center_x = v[19] != 0.0 ? v[20] : (width - 1.0) / 2.0;
  const double center_y = v[19] != 0.0 ? v[21] : (height - 1.0) / 2.0;

  double sine = 0.0;
  double cosine = 1.0;
  sine_cosine(angle, sine, cosine);
  double sine_x = 0.0, cosine_x = 1.0, sine_y = 0.0, cosine_y = 1.0;
  sine_cosine(shear_x, sine_x, cosine_x);
  sine_cosine(shear_y, sine_y, cosine_y);
  const double tangent_x = sine_x / cosine_x;
  const double tangent_y = sine_y / cosine_y;
  // H_x^-1 H_y^-1 S^-1, then R^-1.
  const double a = (1.0 + tangent_x * tangent_y) * inverse_x;
  const double b = tangent_x * inverse_y;
  const double c = tangent_y * inverse_x;
  const double d = inverse_y;
  Map g;
  g.xx = a * cosine + b * sine;
  g.xy = b * cosine - a * sine;
  g.yx = c * cosine + d * sine;
  g.yy = d * cosine - c * sine;
  const double from_x = center_x + move_x;
  const double from_y = center_y + move_y;
  g.x1 = center_x - (g.xx * from_x + g.xy * from_y);
  g.y1 = center_y - (g.yx * from_x + g.yy * from_y);
  s.map = compose(s.map, g);
  const double drawn[] = {angle,   1.0 / inverse_x, 1.0 / inverse_y, shear_x,
                          shear_y, move_x,          move_y};
  std::memcpy(s.draws, drawn, sizeof drawn);
}

void flip(const Step& step, Sample& s) {
  const PhiloxWords words = s.source.words(Operation::kFlip, step.occurrence);
  const bool x = happens(words.word[0], step.values[0]);
  const bool y = happens(words.word[1], step.values[1]);
  Map g;
  if (x) {
    g.xx = -1.0;
    g.x1 = static_cast<double>(s.canvas.width - 1);
  }
  if (y) {
    g.yy = -1.0;
    g.y1 = static_cast<double>(s.canvas.height - 1);
  }
  if (x || y) s.map = compose(s.map, g);
  s.draws[7] = x;
  s.draws[8] = y;
}

void take_window(std::int64_t x0, std::int64_t y0, Size size, Sample& s) {
  Map g;
  g.x1 = static_cast<double>(x0);
  g.y1 = static_cast<double>(y0);
  s.map = compose(s.map, g);
  s.canvas = size;
  s.window(g.x1, g.y1, g.x1 + static_cast<double>(size.width),
           g.y1 + static_cast<double>(size.height));
}

void random_window(const Step& step, Sample& s) {
  const PhiloxWords words = s.source.words(Operation::kCrop, step.occurrence);
  const Range x = window_starts_x(step, s.canvas);
  const Range y = window_starts_y(step, s.canvas);
  take_window(x.low + choice(words.word[0], x.high - x.low + 1),
              y.low + choice(words.word[1], y.high - y.low + 1), window_size(step, s.canvas), s);
}

void central_window(const Step& step, Sample& s) {
  const Size size{whole(step.values[0]), whole(step.values[1])};
  take_window(central_start(s.canvas.width, size.width),
              central_start(s.canvas.height, size.height), size, s);
}

// torchvision's RandomPerspective.
void perspective(const Step& step, Sample& s) {
  const std::uint32_t o = step.occurrence;
  const Operation kind = Operation::kPerspective;
  if (!happens(s.source.words(kind, o, 2).word[0], step.values[0])) return;
  const std::int64_t w = s.canvas.width;
  const std::int64_t h = s.canvas.height;
  const std::int64_t most_x = whole(step.values[1] * static_cast<double>(w / 2)) + 1;
  const std::int64_t most_y = whole(step.values[1] * static_cast<double>(h / 2)) + 1;
  double from[4][2];
  const double right = static_cast<double>(w - 1);
  const double bottom = static_cast<double>(h - 1);
  const double to[4][2] = {{0.0, 0.0}, {right, 0.0}, {right, bottom}, {0.0, bottom}};
  for (int i = 0; i < 4; ++i) {
    const PhiloxWords words = s.source.words(kind, o, static_cast<std::uint32_t>(i / 2));
    const std::int64_t x = choice(words.word[2 * (i % 2)], most_x);
    const std::int64_t y = choice(words.word[2 * (i % 2) + 1], most_y);
    from[i][0] = static_cast<double>(to[i][0] == 0.0 ? x : w - most_x + x);
    from[i][1] = static_cast<double>(to[i][1] == 0.0 ? y : h - most_y + y);
  }
  Map corners;
  if (!map_of_corners(from, to, corners)) return;
  Map before, after;
  before.x1 = before.y1 = 0.5;
  after.x1 = after.y1 = -0.5;
  s.map = compose(s.map, compose(after, compose(corners, before)));
}

void make_room(const Step& step, Sample& s) {
  const Size size = room_size(step, s.canvas);
  Map g;
  g.x1 = 0.5 * static_cast<double>(s.canvas.width - size.width);
  g.y1 = 0.5 * static_cast<double>(s.canvas.height - size.height);
  s.map = compose(s.map, g);
  s.canvas = size;
  s.window(g.x1, g.y1, g.x1 + static_cast<double>(size.width),
           g.y1 + static_cast<double>(size.height));
}

void resize_window(double x0, double y0, double width, double height, Size size, Sample& s) {
  Map g;
  stretch(x0, width, static_cast<double>(size.width), g.xx, g.x1);
  stretch(y0, height, static_cast<double>(size.height), g.yy, g.y1);
  s.map = compose(s.map, g);
  s.canvas = size;
  s.window(x0, y0, x0 + width, y0 + height);
}

// torchvision's RandomResizedCrop: 10 tries, then the largest central window of an allowed shape.
void resized_window(const Step& step, Sample& s) {
  const std::vector<double>& v = step.values;
  const Size size{whole(v[0]), whole(v[1])};
  const auto width = static_cast<double>(s.canvas.width);
  const auto height = static_cast<double>(s.canvas.height);
  const double low = natural_log(v[4]);
  const double high = natural_log(v[5]);
  for (std::uint32_t attempt = 0; attempt < 10; ++attempt) {
    const PhiloxWords words = s.source.words(Operation::kCrop, step.occurrence, attempt);
    const double area = width * height * between(words.word[0], v[2], v[3]);
    const double ratio = exponential(between(words.word[1], low, high));
    const std::int64_t w = to_nearest(std::sqrt(area * ratio));
    const std::int64_t h = to_nearest(std::sqrt(area / ratio));
    if (w < 1 || h < 1 || w > s.canvas.width || h > s.canvas.height) continue;
    const std::int64_t x0 = choice(words.word[2], s.canvas.width - w + 1);
    const std::int64_t y0 = choice(words.word[3], s.canvas.height - h + 1);
    resize_window(static_cast<double>(x0), static_cast<double>(y0), static_cast<double>(w),
                  static_cast<double>(h), size, s);
    return;
  }
  std::int64_t w = s.canvas.width;
  std::int64_t h = s.canvas.height;
  if (width / height < v[4]) {
    h = std::min(h, to_nearest(width / v[4]));
  } else if (width / height > v[5]) {
    w = std::min(w, to_nearest(height * v[5]));
  }
  w = std::max<std::int64_t>(w, 1);
  h = std::max<std::int64_t>(h, 1);
  resize_window(static_cast<double>((s.canvas.width - w) / 2),
                static_cast<double>((s.canvas.height - h) / 2), static_cast<double>(w),
                static_cast<double>(h), size, s);
}

// The weights of red, green and blue in gray (ITU-R BT.601).
constexpr double kGrey[3] = {0.299, 0.587, 0.114};

void color(const Step& step, Sample& s) {
  const std::vector<double>& v = step.values;
  const PhiloxWords words = s.source.words(Operation::kColor, step.occurrence);
  const double brightness = between(words.word[0], v[0], v[1]);
  const double contrast = between(words.word[1], v[2], v[3]);
  const double saturation = between(words.word[2], v[4], v[5]);
  const double gain = contrast * brightness;
  for (int row = 0; row < 3; ++row) {
    double* const out = s.record + 16 + 4 * row;
    for (int column = 0; column < 3; ++column) {
      const double own = row == column ? saturation : 0.0;
      out[column] = gain * (own + (1.0 - saturation) * kGrey[column]);
    }
    // The weights sum to 1 only up to rounding, and gray is to be itself without a change.
    if (saturation == 1.0) out[row] = gain;
    out[3] = 0.5 * (1.0 - contrast);
  }
  const double drawn[] = {brightness, contrast, saturation};
  std::memcpy(s.draws + 13, drawn, sizeof drawn);
}

void box(double* to, std::int64_t x0, std::int64_t y0, std::int64_t x1, std::int64_t y1) {
  to[0] = static_cast<double>(x0);
  to[1] = static_cast<double>(y0);
  to[2] = static_cast<double>(x1);
  to[3] = static_cast<double>(y1);
}

// Zhong et al. 2017 as torchvision has it: 10 tries, or nothing.
void erase(const Step& step, Sample& s) {
  const std::vector<double>& v = step.values;
  const std::uint32_t o = step.occurrence;
  // Its chance has the attempt that the boxes do not use.
  if (!happens(s.source.words(Operation::kErase, o, 10).word[0], v[0])) return;
  const auto area = static_cast<double>(s.canvas.width) * static_cast<double>(s.canvas.height);
  const double low = natural_log(v[3]);
  const double high = natural_log(v[4]);
  for (std::uint32_t attempt = 0; attempt < 10; ++attempt) {
    const PhiloxWords words = s.source.words(Operation::kErase, o, attempt);
    const double part = area * between(words.word[0], v[1], v[2]);
    const double ratio = exponential(between(words.word[1], low, high));
    const std::int64_t h = to_nearest(std::sqrt(part * ratio));
    const std::int64_t w = to_nearest(std::sqrt(part / ratio));
    if (w >= s.canvas.width || h >= s.canvas.height) continue;
    const std::int64_t x0 = choice(words.word[2], s.canvas.width - w + 1);
    const std::int64_t y0 = choice(words.word[3], s.canvas.height - h + 1);
    box(s.record + 6, x0, y0, x0 + w, y0 + h);
    return;
  }
}

// How samples find their partners, and what draws once.
enum class Pairs : std::uint8_t { kByIds, kEach, kPair, kBatch };
Pairs pairs_of(const Step& step) { return static_cast<Pairs>(whole(step.values[4])); }

std::uint64_t bits_of(const PhiloxWords& w) {
  return std::uint64_t{w.word[0]} | std::uint64_t{w.word[1]} << 32;
}

// What a sample is mixed by, in whatever order the samples come: itself, its pair or the batch.
Source mixing_source(const Job& job, const Step& step, std::int64_t i) {
  Source source{job.seed, job.epoch, static_cast<std::uint64_t>(job.ids[i])};
  const Pairs pairs = pairs_of(step);
  auto hash = [&](std::int64_t k) {
    const Source of{job.seed, job.epoch, static_cast<std::uint64_t>(job.ids[k])};
    return bits_of(of.words(Operation::kMixOrder, step.occurrence));
  };
  if (pairs == Pairs::kPair) source.id = hash(i) + hash(job.samples - 1 - i);
  if (pairs == Pairs::kBatch) {
    source.id = 0;
    for (std::int64_t k = 0; k < job.samples; ++k) source.id += hash(k);
  }
  return source;
}

// Everything but the partner, which needs the batch. False: this sample is not mixed.
bool mix(const Step& step, const Source& source, Sample& s) {
  const std::vector<double>& v = step.values;
  const std::uint32_t o = step.occurrence;
  const PhiloxWords words = source.words(Operation::kMix, o);
  if (!happens(words.word[0], v[0])) return false;
  const bool cut = happens(words.word[1], v[3]);
  Stream stream(source, Operation::kMixWeight, o);
  const double weight = beta_variate(stream, cut ? v[2] : v[1]);
  if (!cut) {
    box(s.record + 10, 0, 0, s.canvas.width, s.canvas.height);
    s.record[15] = weight;
    return true;
  }
  // Yun et al. 2019: a box of 1 - weight of the area around a random point, cut off at the edges.
  const PhiloxWords place = source.words(Operation::kMixBox, o);
  const std::int64_t x = choice(place.word[0], s.canvas.width);
  const std::int64_t y = choice(place.word[1], s.canvas.height);
  const double side = 0.5 * std::sqrt(1.0 - weight);
  const auto half_x = whole(side * static_cast<double>(s.canvas.width));
  const auto half_y = whole(side * static_cast<double>(s.canvas.height));
  box(s.record + 10, std::max<std::int64_t>(x - half_x, 0), std::max<std::int64_t>(y - half_y, 0),
      std::min(x + half_x, s.canvas.width), std::min(y + half_y, s.canvas.height));
  s.record[15] = 0.0;
  return s.record[10] < s.record[12] && s.record[11] < s.record[13];
}

void set_partner(const Job& job, std::int64_t i, std::int64_t partner, bool mixed) {
  double* const record = job.records + i * kRecordSize;
  if (mixed && partner != i) {
    record[14] = static_cast<double>(partner);
  } else {
    box(record + 10, 0, 0, 0, 0);
    record[15] = 1.0;
  }
}

// Every sample takes the next one in the order of hashes, or the one as far from the batch's end.
void choose_partners(const Job& job, const Step& step, const std::vector<bool>& mixed) {
  if (pairs_of(step) != Pairs::kByIds) {
    for (std::int64_t i = 0; i < job.samples; ++i)
      set_partner(job, i, job.samples - 1 - i, mixed[static_cast<std::size_t>(i)]);
    return;
  }
  struct Place {
    std::uint64_t hash;
    std::int64_t id;
    std::int64_t index;
    bool operator<(const Place& other) const {
      if (hash != other.hash) return hash < other.hash;
      return id != other.id ? id < other.id : index < other.index;
    }
  };
  std::vector<Place> order;
  order.reserve(static_cast<std::size_t>(job.samples));
  for (std::int64_t i = 0; i < job.samples; ++i) {
    const Source source{job.seed, job.epoch, static_cast<std::uint64_t>(job.ids[i])};
    order.push_back({bits_of(source.words(Operation::kMixOrder, step.occurrence)), job.ids[i], i});
  }
  std::sort(order.begin(), order.end());
  for (std::size_t k = 0; k < order.size(); ++k) {
    const std::int64_t i = order[k].index;
    set_partner(job, i, order[(k + 1) % order.size()].index, mixed[static_cast<std::size_t>(i)]);
  }
}

const Size& input_of(const Job& job, std::int64_t i) {
  return job.inputs[job.inputs.size() > 1 ? static_cast<std::size_t>(i) : 0];
}

std::string text(const Size& size) {
  return "(" + std::to_string(size.height) + ", " + std::to_string(size.width) + ")";
}

bool scales_both(StepKind kind) { return kind == StepKind::kShortest || kind == StepKind::kJitter; }

// Whether a step may give equal canvases several sizes.
bool has_random_size(const Step& step) {
  const std::vector<double>& v = step.values;
  if (step.kind == StepKind::kShortest) return v[2] > 1.0;
  if (step.kind == StepKind::kJitter) return v[2] != v[3];
  return step.kind == StepKind::kSide && v[0] != v[1];
}

// The size that a step gives a canvas.
Size size_after(const Step& step, const Size& canvas, const Source& source) {
  const StepKind kind = step.kind;
  if (kind == StepKind::kRoom) return room_size(step, canvas);
  if (kind == StepKind::kSide) return side_size(step, canvas, source);
  if (scales_both(kind)) return factor_size(step, canvas, source);
  if (kind == StepKind::kWindow) return window_size(step, canvas);
  if (kind == StepKind::kCenter || kind == StepKind::kResized || kind == StepKind::kWhole)
    return {whole(step.values[0]), whole(step.values[1])};
  return canvas;
}

Size output_size(const Job& job, const Source& source, Size canvas) {
  for (const Step& step : job.steps) {
    const Size size = size_after(step, canvas, source);
    Size room = canvas;
    bool must_fit = step.kind == StepKind::kCenter && step.values[2] == 0.0;
    if (step.kind == StepKind::kWindow) {
      room.height += whole(step.values[3]) + whole(step.values[5]);
      room.width += whole(step.values[2]) + whole(step.values[4]);
      must_fit = step.values[6] == 0.0;
    }
    if (must_fit && (size.height > room.height || size.width > room.width)) {
      throw std::invalid_argument("size " + text(size) +
                                  " is larger than the image with its padding, " + text(room));
    }
    canvas = size;
  }
  return canvas;
}

}  // namespace

Size output_size(const Job& job) {
  bool random = false;
  for (const Step& step : job.steps) random = random || has_random_size(step);
  auto size_of = [&](std::int64_t i) {
    const std::uint64_t id = job.samples > 0 ? static_cast<std::uint64_t>(job.ids[i]) : 0;
    return output_size(job, Source{job.seed, job.epoch, id}, input_of(job, i));
  };
  const Size size = size_of(0);
  for (std::int64_t i = 1; i < job.samples && (random || job.inputs.size() > 1); ++i) {
    const Size other = size_of(i);
    if (other.height != size.height || other.width != size.width) {
      throw std::invalid_argument("images must be of one size in the end, got " + text(size) +
                                  " and " + text(other) +
                                  "; add a crop or a Resize to (height, width)");
    }
  }
  return size;
}

void draw(const Job& job) {
  std::vector<bool> mixed(static_cast<std::size_t>(job.samples), false);
  const Step* mixing = nullptr;
  for (std::int64_t i = 0; i < job.samples; ++i) {
    const Source source{job.seed, job.epoch, static_cast<std::uint64_t>(job.ids[i])};
    const Size& input = input_of(job, i);
    Sample s{source, job.records + i * kRecordSize, job.draws + i * kDrawsSize, input, {}};
    std::fill_n(s.record, kRecordSize, 0.0);
    std::fill_n(s.draws, kDrawsSize, 0.0);
    s.record[14] = -1.0;
    s.record[15] = 1.0;
    s.record[16] = s.record[21] = s.record[26] = 1.0;
    s.draws[1] = s.draws[2] = s.draws[13] = s.draws[14] = s.draws[15] = 1.0;
    s.window(0.0, 0.0, static_cast<double>(input.width), static_cast<double>(input.height));
    for (const Step& step : job.steps) {
      switch (step.kind) {
        case StepKind::kAffine:
          affine(step, s);
          break;
        case StepKind::kFlip:
          flip(step, s);
          break;
        case StepKind::kWindow:
          random_window(step, s);
          break;
        case StepKind::kCenter:
          central_window(step, s);
          break;
        case StepKind::kResized:
          resized_window(step, s);
          break;
        case StepKind::kWhole:
        case StepKind::kSide:
        case StepKind::kShortest:
        case StepKind::kJitter:
          if (scales_both(step.kind))
            s.draws[1] = s.draws[2] = drawn_factor(step, s.canvas, source);
          resize_window(0.0, 0.0, static_cast<double>(s.canvas.width),
                        static_cast<double>(s.canvas.height), size_after(step, s.canvas, source),
                        s);
          break;
        case StepKind::kColor:
          color(step, s);
          break;
        case StepKind::kErase: {
          erase(step, s);
          const PhiloxWords w = source.words(Operation::kEraseNoise, step.occurrence);
          for (int half = 0; half < 2; ++half) {
            job.keys[2 * i + half] = static_cast<std::int64_t>(
                std::uint64_t{w.word[2 * half]} | std::uint64_t{w.word[2 * half + 1]} << 32);
          }
          break;
        }
        case StepKind::kMix:
          mixed[static_cast<std::size_t>(i)] = mix(step, mixing_source(job, step, i), s);
          mixing = &step;
          break;
        case StepKind::kRoom:
          make_room(step, s);
          break;
        case StepKind::kPerspective:
          perspective(step, s);
          break;
      }
    }
    const double matrix[] = {s.map.xx, s.map.xy, s.map.x1, s.map.yx, s.map.yy, s.map.y1};
    std::memcpy(s.record, matrix, sizeof matrix);
    s.record[28] = s.map.px;
    s.record[29] = s.map.py;
  }
  if (mixing != nullptr) choose_partners(job, *mixing, mixed);
}

void draw_numbers(const Job& job, std::uint32_t occurrence, std::int64_t columns,
                  std::int64_t normals, double* out) {
  for (std::int64_t i = 0; i < job.samples; ++i, out += columns) {
    const Source source{job.seed, job.epoch, static_cast<std::uint64_t>(job.ids[i])};
    Stream uniform(source, Operation::kProgram, occurrence);
    Stream gaussian(source, Operation::kProgramNormal, occurrence);
    for (std::int64_t k = 0; k < columns; ++k)
      out[k] = k < columns - normals ? unit(uniform.next()) : normal(gaussian);
  }
}

}  // namespace fusereg::augment::params

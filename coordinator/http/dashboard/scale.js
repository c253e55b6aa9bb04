// Maps values to pixels, and finds round numbers to mark.

export class Scale {
  constructor(low, high, from, to) {
    if (!(high > low)) [low, high] = [low - (Math.abs(low) || 1) * 0.05, low + (Math.abs(low) || 1) * 0.05];
    Object.assign(this, { low, high, from, to });
  }

  at(value) {
    return this.from + ((value - this.low) / (this.high - this.low)) * (this.to - this.from);
  }

  back(pixel) {
    return this.low + ((pixel - this.from) / (this.to - this.from)) * (this.high - this.low);
  }

  // At most about `most` round values within the range; with a `base` of 1024 they are round in KiB, MiB and so on.
  marks(most, base = 1) {
    const unit = base > 1 ? base ** Math.max(0, Math.floor(Math.log(this.high / 2 || 1) / Math.log(base))) : 1;
    const rough = (this.high - this.low) / Math.max(1, most) / unit;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough) * unit;
    const marks = [];
    // With 0 added, as the ceiling of a little below 0 is -0.
    for (let index = Math.ceil(this.low / step - 1e-9) + 0; index * step <= this.high + step * 1e-9; index += 1) marks.push(index * step);
    return { marks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
  }
}

// Numbers, times and states as people read them.

const GOOD = new Set(["done", "idle"]);
const BUSY = new Set(["running", "busy", "preparing", "joined"]);
const BAD = new Set(["failed", "lost"]);

export function stateClass(state) {
  if (GOOD.has(state)) return "good";
  if (BUSY.has(state)) return "busy";
  return BAD.has(state) ? "bad" : "warn";
}

function scaled(value, base, units) {
  let index = 0;
  while (Math.abs(value) >= base && index < units.length - 1) {
    value /= base;
    index += 1;
  }
  const digits = index === 0 || Math.abs(value) >= 100 ? 0 : 1;
  return `${value.toFixed(digits)} ${units[index]}`.trim();
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const bytes = (value) => (known(value) ? scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]) : "–");
export const rate = (value) => (known(value) ? `${bytes(value)}/s` : "–");
export const bits = (value) => (known(value) ? `${scaled(value * 8, 1000, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"])}` : "–");
export const flops = (value) => (value ? scaled(value, 1000, ["", "k", "M", "G", "T", "P"]) : "–");

export function seconds(value) {
  if (!known(value)) return "–";
  if (value === 0) return "0 s";
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(1)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes}m${String(Math.floor(value % 60)).padStart(2, "0")}s`;
  return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
}

export const percent = (value) => (known(value) ? `${(value * 100).toFixed(value < 0.1 ? 1 : 0)} %` : "–");
export const precise = (value) => (known(value) ? Number(value).toPrecision(5) : "–");
// A rate of which a few a second are told apart.
export const perSecond = (value) => (value && value < 100 ? value.toFixed(1) : count(value));
export const pace = ({ tokens_per_second: tokens, samples_per_second: samples }) =>
  (tokens ? `${perSecond(tokens)} tokens/s` : samples ? `${perSecond(samples)} samples/s` : "–");
export const count = (value) => (known(value) ? Math.round(value).toLocaleString("en") : "–");
export const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");
export const day = (time) => new Date(time * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

// The same colour for a worker wherever it is drawn: by its place in the plan.
export const workerHue = (index) => (212 + index * 137.5) % 360;

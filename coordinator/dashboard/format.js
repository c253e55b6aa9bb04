// Numbers and states as people read them.

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
  const digits = index === 0 || value >= 100 ? 0 : 1;
  return `${value.toFixed(digits)} ${units[index]}`.trim();
}

export const bytes = (value) => scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]);
export const flops = (value) => (value ? scaled(value, 1000, ["", "k", "M", "G", "T", "P"]) : "–");

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 60) return `${value.toFixed(1)} s`;
  const minutes = Math.floor(value / 60);
  if (minutes < 60) return `${minutes}m${String(Math.round(value % 60)).padStart(2, "0")}s`;
  return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
}

export const loss = (value) => (value === null || value === undefined ? "–" : Number(value).toPrecision(5));
export const count = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
export const clock = (time) => new Date(time * 1000).toLocaleTimeString("en-GB");

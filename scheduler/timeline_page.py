"""The page around a timeline: draws spans on a canvas to pan, zoom and point at. Nothing is loaded from elsewhere."""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>@title@</title>
<style>
body { font: 14px system-ui, sans-serif; margin: 1.5rem; color: #222; background: #fff }
h1 { font-size: 1.3rem } .legend span { padding: 2px 8px; border-radius: 3px; font-size: 12px; margin-right: 2px }
button { font: inherit } canvas { display: block; width: 100%; cursor: grab; border: 1px solid #ddd; margin: .6rem 0 }
#tip { position: fixed; display: none; pointer-events: none; background: #222; color: #fff; padding: 3px 7px;
  border-radius: 4px; font-size: 12px; white-space: nowrap }
table { border-collapse: collapse } th, td { padding: 2px 12px 2px 0; text-align: right }
th:first-child, td:first-child { text-align: left } th { border-bottom: 1px solid #999; font-weight: 600 }
</style></head><body>
<h1>@title@</h1><p>@summary@</p>
<p class="legend">@legend@</p>
<p><button id="all">all</button> <button id="one">last step</button> <button id="in">+</button> <button id="out">&minus;</button>
 wheel: zoom, drag: pan, point at a bar: what it is</p>
<canvas id="view" role="img" aria-label="@title@"></canvas><div id="tip"></div>
<h2>One step, by worker</h2>@table@
<script type="application/json" id="data">@data@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.getElementById("view"), pen = canvas.getContext("2d"), tip = document.getElementById("tip");
const ROW = 22, LEFT = 190, TOP = 24, height = TOP + ROW * data.rows.length + 6;
let from = 0, to = data.end, width = 0;
const byRow = data.rows.map((_, row) => data.spans.filter(span => span[0] === row).sort((a, b) => a[3] - b[3]));
const x = time => LEFT + (time - from) / (to - from) * (width - LEFT);
const unit = to - from;
function seconds(value) {
  const digits = Math.max(0, Math.min(9, 2 - Math.floor(Math.log10(Math.max((to - from) / 10, 1e-9)))));
  return value >= 1 || to - from >= 1 ? value.toFixed(Math.min(digits, 6)) + " s" : (value * 1e3).toFixed(Math.max(0, digits - 3)) + " ms";
}
function draw() {
  const scale = window.devicePixelRatio || 1;
  width = canvas.clientWidth;
  canvas.width = width * scale; canvas.height = height * scale; canvas.style.height = height + "px";
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif"; pen.textBaseline = "middle";
  const step = 10 ** Math.floor(Math.log10((to - from) / 5)), every = [1, 2, 5, 10].map(n => n * step).find(n => (to - from) / n <= 8);
  pen.textAlign = "center";
  for (let mark = Math.ceil(from / every) * every; mark <= to; mark += every) {
    pen.fillStyle = "#e8e8e8"; pen.fillRect(x(mark), TOP - 4, 1, height);
    pen.fillStyle = "#666"; pen.fillText(seconds(mark), x(mark), 10);
  }
  data.ends.forEach(end => { pen.fillStyle = "#c33"; pen.fillRect(x(end), TOP - 4, 1, height); });
  data.rows.forEach((name, row) => {
    const top = TOP + row * ROW;
    if (row < data.workers) { pen.fillStyle = data.colors.idle; pen.fillRect(LEFT, top + 2, width - LEFT, ROW - 4); }
    let drawn = -1;
    for (const [, kind, label, start, end] of byRow[row]) {
      if (end < from || start > to) continue;
      const left = Math.max(x(start), LEFT), right = Math.min(x(end), width);
      if (right < drawn + 0.3 && right - left < 0.3) continue;
      drawn = right;
      pen.fillStyle = data.colors[kind];
      pen.fillRect(left, top + 2, Math.max(right - left - (right - left > 3 ? 0.6 : 0), 0.5), ROW - 4);
      if (right - left > 14 && label !== "") { pen.fillStyle = "#fff"; pen.fillText(label, (left + right) / 2, top + ROW / 2); }
    }
    pen.fillStyle = "#fff"; pen.fillRect(0, top, LEFT - 2, ROW);
  });
  pen.textAlign = "left"; pen.fillStyle = "#222";
  data.rows.forEach((name, row) => pen.fillText(name.length > 30 ? name.slice(0, 29) + "…" : name, 4, TOP + row * ROW + ROW / 2));
}
function look(start, end) {
  const least = unit * 1e-6, size = Math.min(Math.max(end - start, least), data.end * 1.1);
  from = Math.max(-0.02 * data.end, Math.min(start, data.end * 1.02 - size)); to = from + size; draw();
}
function zoom(factor, at) { look(at - (at - from) * factor, at + (to - at) * factor); }
const timeAt = event => from + Math.max(0, event.offsetX - LEFT) / (width - LEFT) * (to - from);
canvas.addEventListener("wheel", event => { event.preventDefault(); zoom(Math.exp(event.deltaY * 0.0015), timeAt(event)); }, { passive: false });
let held = null;
canvas.addEventListener("pointerdown", event => { held = [event.offsetX, from, to]; canvas.setPointerCapture(event.pointerId); });
canvas.addEventListener("pointerup", () => { held = null; });
canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
canvas.addEventListener("pointermove", event => {
  if (held) {
    const moved = (event.offsetX - held[0]) / (width - LEFT) * (held[2] - held[1]);
    look(held[1] - moved, held[2] - moved);
    return;
  }
  const row = Math.floor((event.offsetY - TOP) / ROW), at = timeAt(event), slack = (to - from) / (width - LEFT);
  const span = event.offsetX < LEFT ? undefined : (byRow[row] || []).find(span => span[3] - slack <= at && at <= span[4] + slack);
  const text = span ? span[5] : row >= 0 && row < data.workers && event.offsetX >= LEFT ? "idle" : "";
  tip.style.display = text ? "block" : "none";
  tip.textContent = text ? data.rows[row] + ": " + text : "";
  tip.style.left = Math.min(event.clientX + 12, window.innerWidth - tip.offsetWidth - 8) + "px"; tip.style.top = event.clientY + 14 + "px";
});
document.getElementById("all").onclick = () => look(0, data.end);
document.getElementById("one").onclick = () => look(data.ends.at(-2) || 0, data.ends.at(-1));
document.getElementById("in").onclick = () => zoom(0.6, (from + to) / 2);
document.getElementById("out").onclick = () => zoom(1 / 0.6, (from + to) / 2);
window.addEventListener("resize", draw);
draw();
</script></body></html>
"""

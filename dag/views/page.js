"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const NS = "http://www.w3.org/2000/svg";
  const NODE = { width: 178, height: 42 }, STORED = 14, FOLDED = { width: 246, height: 50 };
  const GAP_X = 18, GAP_Y = 26, PAD = 16, HEAD = 28;

  const groups = new Map(data.groups.map((group) => [group.id, group]));
  const ops = new Map(Object.entries(data.ops).map(([id, op]) => [Number(id), op]));
  const parentOf = new Map(); // op id or -(group id)-1 -> group id
  for (const group of data.groups) for (const row of group.rows) for (const item of row) parentOf.set(item, group.id);
  for (const op of ops.values()) op.users = [];
  // --- where things run, when the page has a plan: op -> index of its worker; a group has one when all its members share it
  const hostsOf = (item) => {
    if (item >= 0) return new Set([data.hosts[data.fragments[item]]].filter((host) => host !== undefined));
    return new Set(groups.get(-item - 1).rows.flat().flatMap((member) => [...hostsOf(member)]));
  };
  const runsOn = (item) => {
    if (!data.workers) return null;
    const hosts = hostsOf(item);
    return hosts.size === 1 ? [...hosts][0] : null;
  };
  for (const [id, op] of ops) {
    const fragment = data.workers && data.fragments[id];
    if (fragment === undefined || !data.workers) continue;
    op.details.unshift(["Worker", data.workers[runsOn(id)]], ["Fragment", String(fragment)]);
    op.find += " " + data.workers[runsOn(id)].toLowerCase();
  }
  for (const [id, op] of ops) for (const source of op.in) ops.get(source)?.users.push(id);

  const view = byId("view"), scene = byId("scene");
  const layers = { boxes: byId("boxes"), edges: byId("edges"), nodes: byId("nodes") };
  let camera = { x: 0, y: 0, zoom: 1 };
  let fitted = null; // the least zoom that everything was fitted with; null once somebody has moved the camera
  let placed = new Map(); // visible item -> {x, y, w, h}
  let elements = new Map();
  let edges = [];
  let chosen = null;
  let found = [], at = -1;

  // --- layout: rows come from the page's data; boxes are packed here, since their sizes change when a module is folded
  function measure(item) {
    if (item >= 0) {
      const extra = ops.get(item).stored.length ? STORED : 0;
      return { item, w: NODE.width, h: NODE.height + extra };
    }
    const group = groups.get(-item - 1);
    if (!group.open) return { item, w: FOLDED.width, h: FOLDED.height };
    const rows = group.rows.map((row) => {
      const members = row.map(measure);
      return {
        members,
        w: members.reduce((sum, member) => sum + member.w, 0) + GAP_X * (members.length - 1),
        h: Math.max(...members.map((member) => member.h)),
      };
    });
    const head = group.id === 0 ? 0 : HEAD;
    const w = Math.max(FOLDED.width, ...rows.map((row) => row.w)) + 2 * PAD;
    const h = rows.reduce((sum, row) => sum + row.h, 0) + GAP_Y * (rows.length - 1) + 2 * PAD + head;
    return { item, w, h, rows, head };
  }

  function place(box, x, y) {
    placed.set(box.item, { x, y, w: box.w, h: box.h, open: Boolean(box.rows) });
    if (!box.rows) return;
    let top = y + PAD + box.head;
    for (const row of box.rows) {
      let left = x + (box.w - row.w) / 2;
      for (const member of row.members) {
        place(member, left, top + (row.h - member.h) / 2);
        left += member.w + GAP_X;
      }
      top += row.h + GAP_Y;
    }
  }

  const visible = (item) => { // the op itself, or the outermost folded group around it
    let shown = item;
    for (let group = parentOf.get(item); group !== undefined; group = parentOf.get(-group - 1)) {
      if (!groups.get(group).open) shown = -group - 1;
    }
    return shown;
  };

  function route() {
    const wanted = new Map();
    for (const [id, op] of ops) {
      for (const source of op.in) {
        const from = visible(source), to = visible(id);
        if (from !== to) wanted.set(from + ">" + to, [from, to]);
      }
    }
    const leaves = [...placed.values()].filter((box) => !box.open).sort((a, b) => a.y - b.y);
    const inTheWay = (left, right, top, bottom) =>
      leaves.filter((box) => box.y + box.h > top && box.y < bottom && box.x < right && box.x + box.w > left);
    return [...wanted.values()].map(([from, to]) => {
      const a = placed.get(from), b = placed.get(to);
      const x1 = a.x + a.w / 2, y1 = a.y + a.h, x2 = b.x + b.w / 2, y2 = b.y;
      const top = y1 + 2, bottom = y2 - 2;
      let path;
      const blocked = bottom > top && inTheWay(Math.min(x1, x2) - 4, Math.max(x1, x2) + 4, top, bottom);
      if (!blocked || !blocked.length) {
        const bend = Math.max(12, Math.min(60, (y2 - y1) / 2));
        path = `M${x1} ${y1}C${x1} ${y1 + bend} ${x2} ${y2 - bend} ${x2} ${y2}`;
      } else { // go around what is in between, on the nearer side
        const lane = (side) => {
          let x = side > 0 ? Math.max(x1, x2) : Math.min(x1, x2), hits = blocked;
          for (let round = 0; round < 8 && hits.length; round++) {
            x = side > 0 ? Math.max(...hits.map((box) => box.x + box.w)) + 9 : Math.min(...hits.map((box) => box.x)) - 9;
            hits = inTheWay(x - 4, x + 4, top + 8, bottom - 8);
          }
          return x;
        };
        const right = lane(1), left = lane(-1);
        const x = Math.abs(right - x1) + Math.abs(right - x2) <= Math.abs(left - x1) + Math.abs(left - x2) ? right : left;
        const bend = Math.min(34, (y2 - y1) / 2);
        path = `M${x1} ${y1}C${x1} ${y1 + bend * 0.7} ${x} ${y1 + bend * 0.3} ${x} ${y1 + bend}` +
          `L${x} ${y2 - bend}C${x} ${y2 - bend * 0.3} ${x2} ${y2 - bend * 0.7} ${x2} ${y2}`;
      }
      return { from, to, path };
    });
  }

  // --- drawing
  function svg(name, attributes, parent, text) {
    const element = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }
  const clip = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);

  function draw() {
    placed = new Map();
    elements = new Map();
    place(measure(-1), 0, 0);
    edges = route();
    for (const layer of Object.values(layers)) layer.replaceChildren();
    for (const [item, box] of placed) {
      if (item === -1) continue;
      elements.set(item, item >= 0 ? drawOp(item, box) : drawGroup(groups.get(-item - 1), item, box));
    }
    for (const edge of edges) edge.element = svg("path", { class: "edge", d: edge.path }, layers.edges);
    mark();
  }

  function drawOp(id, box) {
    const op = ops.get(id);
    const g = svg("g", { class: `node ${op.class}`, transform: `translate(${box.x} ${box.y})` }, layers.nodes);
    svg("rect", { class: "card face", width: box.w, height: box.h, rx: 7 }, g);
    svg("rect", { class: "tag", width: 5, height: box.h - 10, x: 5, y: 5, rx: 2.5 }, g);
    const label = svg("text", { x: 17, y: 18 }, g, clip(op.label, 23));
    const room = 22 - op.label.length;
    if (op.module && room > 2) svg("tspan", { dx: 6, class: "module" }, label, clip(op.module, room));
    svg("text", { x: 17, y: 33, class: "shape" }, g, clip(op.shape, 23));
    if (op.stored.length) svg("text", { x: 17, y: 47, class: "stored" }, g, clip("+ " + op.stored.join(", "), 30));
    svg("title", {}, g, `${op.name}\n${op.shape}` + (runsOn(id) === null ? "" : `\n${data.workers[runsOn(id)]}`));
    paint(g, id);
    g.addEventListener("click", () => choose(id));
    return g;
  }

  function drawGroup(group, item, box) {
    const g = svg("g", { class: box.open ? "box" : "box folded", transform: `translate(${box.x} ${box.y})` },
      box.open ? layers.boxes : layers.nodes);
    g.style.setProperty("--h", group.hue);
    paint(g, item);
    if (!box.open) svg("rect", { class: "stack", width: box.w, height: box.h, rx: 9 }, g);
    svg("rect", { class: "face", width: box.w, height: box.h, rx: 9 }, g);
    const head = svg("g", { class: "head" }, g);
    svg("rect", { width: box.w, height: box.open ? HEAD : box.h, fill: "transparent" }, head);
    const room = Math.floor((box.w - 40) / 7);
    svg("text", { x: 32, y: 20 }, head, clip(group.name, room));
    const hosts = data.workers ? [...hostsOf(item)].map((worker) => data.workers[worker]).join(", ") : "";
    const host = hosts && `${hosts} · `;
    if (!box.open) svg("text", { x: 32, y: 37, class: "count" }, head, clip(host + group.summary, 36));
    svg("title", {}, head, `${group.path}\n${host}${group.summary}`);
    const toggle = svg("g", { class: "toggle", role: "button" }, g);
    svg("rect", { x: 6, y: 5, width: 22, height: 22, rx: 5 }, toggle);
    svg("path", { d: box.open ? "M12 13L17 18.5L22 13" : "M14.5 10.5L20 16L14.5 21.5", fill: "none", "stroke-width": 2,
      style: "stroke: hsl(var(--h) 55% var(--head-l))" }, toggle);
    toggle.addEventListener("click", (event) => { event.stopPropagation(); fold(group); });
    head.addEventListener("click", () => choose(item));
    head.addEventListener("dblclick", () => fold(group));
    return g;
  }

  // The colour of the worker; groups over several workers, and pages without a plan, keep their own.
  const hueOf = (worker) => (212 + worker * 137.5) % 360;
  function paint(g, item) {
    if (!data.workers) return;
    const worker = runsOn(item);
    if (item >= 0) {
      g.style.setProperty("--c", worker === null ? "var(--soft)" : `hsl(${hueOf(worker)} 65% 48%)`);
    } else {
      if (worker === null) g.classList.add("mixed");
      else g.style.setProperty("--h", hueOf(worker));
    }
  }

  function fold(group) { // keeps the module's top left corner where it is on the screen
    const item = -group.id - 1, before = placed.get(item);
    group.open = !group.open;
    draw();
    const after = placed.get(item);
    camera.x += (before.x - after.x + (before.w - after.w) / 2) * camera.zoom;
    camera.y += (before.y - after.y) * camera.zoom;
    look();
  }

  function foldAll(open) {
    for (const group of data.groups) group.open = group.id === 0 || open;
    draw();
    fit();
  }

  function reveal(item) {
    for (let group = parentOf.get(item); group !== undefined; group = parentOf.get(-group - 1)) groups.get(group).open = true;
    draw();
  }

  // --- what is chosen and found
  function mark() {
    const hits = new Set(found.map(visible));
    for (const [item, element] of elements) {
      element.classList.toggle("found", hits.has(item));
      element.classList.toggle("chosen", item === chosen);
      element.classList.remove("near");
    }
    for (const edge of edges) {
      const hot = chosen !== null && (edge.from === chosen || edge.to === chosen);
      edge.element.classList.toggle("hot", hot);
      if (hot) {
        layers.edges.append(edge.element);
        elements.get(edge.from === chosen ? edge.to : edge.from)?.classList.add("near");
      }
    }
  }

  function choose(item) {
    chosen = item;
    mark();
    byId("panel").hidden = item === null;
    if (item === null) return;
    const thing = item >= 0 ? ops.get(item) : groups.get(-item - 1);
    byId("heading").textContent = thing.name;
    const details = byId("details"), links = byId("links");
    details.replaceChildren();
    links.replaceChildren();
    for (const [key, value] of thing.details) {
      details.append(Object.assign(document.createElement("dt"), { textContent: key }),
        Object.assign(document.createElement("dd"), { textContent: value }));
    }
    if (item >= 0) {
      addLinks(links, "Reads", thing.in);
      addLinks(links, "Read by", thing.users);
    } else if (item === -1) {
      for (const note of data.notes) {
        details.append(Object.assign(document.createElement("dd"), { textContent: note, className: "note" }));
      }
    }
  }

  function addLinks(parent, title, ids) {
    if (!ids.length) return;
    parent.append(Object.assign(document.createElement("h3"), { textContent: title }));
    for (const id of ids) {
      const button = Object.assign(document.createElement("button"), { textContent: ops.get(id).name });
      button.addEventListener("click", () => goTo(id));
      parent.append(button);
    }
  }

  function goTo(item) {
    reveal(item);
    choose(item);
    const box = placed.get(item), size = view.getBoundingClientRect();
    camera.zoom = Math.max(camera.zoom, 0.9);
    camera.x = size.width / 2 - (box.x + box.w / 2) * camera.zoom;
    camera.y = size.height / 2 - (box.y + box.h / 2) * camera.zoom;
    look();
  }

  function search(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    found = words.length ? [...ops].filter(([, op]) => words.every((word) => op.find.includes(word))).map(([id]) => id) : [];
    at = -1;
    byId("matches").textContent = words.length ? `${found.length} found` : "";
    mark();
  }

  function nextMatch(by) {
    if (!found.length) return;
    at = (at + by + found.length) % found.length;
    byId("matches").textContent = `${at + 1} of ${found.length}`;
    goTo(found[at]);
  }

  // --- the camera
  function look() {
    fitted = null;
    scene.setAttribute("transform", `translate(${camera.x} ${camera.y}) scale(${camera.zoom})`);
  }

  function zoomAt(factor, x, y) {
    const zoom = Math.min(4, Math.max(0.02, camera.zoom * factor));
    camera.x = x - (x - camera.x) * (zoom / camera.zoom);
    camera.y = y - (y - camera.y) * (zoom / camera.zoom);
    camera.zoom = zoom;
    look();
  }

  function zoomMiddle(factor) {
    const size = view.getBoundingClientRect();
    zoomAt(factor, size.width / 2, size.height / 2);
  }

  function fit(atLeast = 0) {
    const size = view.getBoundingClientRect(), all = placed.get(-1);
    const whole = Math.min((size.width - 24) / all.w, (size.height - 24) / all.h, 1.4);
    camera.zoom = Math.max(whole, atLeast);
    camera.x = (size.width - all.w * camera.zoom) / 2;
    camera.y = Math.max((size.height - all.h * camera.zoom) / 2, 4);
    look();
    fitted = atLeast;
  }
  new ResizeObserver(() => fitted !== null && fit(fitted)).observe(view);

  const pointers = new Map();
  let moved = false;
  view.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, event);
    moved = false;
  });
  view.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return;
    const dx = event.clientX - before.clientX, dy = event.clientY - before.clientY;
    if (!moved && Math.abs(dx) + Math.abs(dy) < 4) return;
    if (!moved) { // captured only now, so that a plain click still reaches what was clicked
      moved = true;
      view.setPointerCapture(event.pointerId);
      view.classList.add("dragging");
    }
    if (pointers.size === 2) {
      const [other] = [...pointers.values()].filter((pointer) => pointer.pointerId !== event.pointerId);
      const spread = (pointer) => Math.hypot(pointer.clientX - other.clientX, pointer.clientY - other.clientY) || 1;
      const size = view.getBoundingClientRect();
      zoomAt(spread(event) / spread(before), (event.clientX + other.clientX) / 2 - size.left,
        (event.clientY + other.clientY) / 2 - size.top);
    }
    camera.x += dx / pointers.size;
    camera.y += dy / pointers.size;
    pointers.set(event.pointerId, event);
    look();
  });
  const release = (event) => {
    pointers.delete(event.pointerId);
    view.classList.remove("dragging");
  };
  view.addEventListener("pointerup", release);
  view.addEventListener("pointercancel", release);
  view.addEventListener("click", (event) => {
    if (!moved && event.target === view) choose(null);
  });
  view.addEventListener("wheel", (event) => {
    event.preventDefault();
    const size = view.getBoundingClientRect();
    const lines = event.deltaMode === 1 ? 20 : 1;
    zoomAt(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0016)), event.clientX - size.left, event.clientY - size.top);
  }, { passive: false });

  document.addEventListener("keydown", (event) => {
    const typing = event.target === byId("search");
    if (event.key === "Escape") {
      if (typing) byId("search").blur();
      choose(null);
    } else if (typing && event.key === "Enter") {
      nextMatch(event.shiftKey ? -1 : 1);
    } else if (!typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      const step = 60;
      const action = {
        "+": () => zoomMiddle(1.25), "=": () => zoomMiddle(1.25), "-": () => zoomMiddle(0.8),
        ArrowLeft: () => { camera.x += step; look(); }, ArrowRight: () => { camera.x -= step; look(); },
        ArrowUp: () => { camera.y += step; look(); }, ArrowDown: () => { camera.y -= step; look(); },
        f: () => fit(), 0: () => fit(), c: () => foldAll(false), e: () => foldAll(true),
        n: () => nextMatch(1), "/": () => byId("search").focus(),
      }[event.key];
      if (action) { event.preventDefault(); action(); }
    }
  });
  byId("search").addEventListener("input", (event) => search(event.target.value));
  byId("in").addEventListener("click", () => zoomMiddle(1.25));
  byId("out").addEventListener("click", () => zoomMiddle(0.8));
  byId("fit").addEventListener("click", () => fit());
  byId("fold").addEventListener("click", () => foldAll(false));
  byId("unfold").addEventListener("click", () => foldAll(true));
  byId("close").addEventListener("click", () => choose(null));

  // --- start
  byId("name").textContent = data.name;
  byId("summary").textContent = data.summary;
  const used = new Set([...ops.values()].map((op) => op.class));
  for (const name of ["input", "compute", "norm", "activation", "random", "lookup", "layout", "other", "loss"]) {
    if (used.has(name) && !data.workers) {
      byId("legend").append(Object.assign(document.createElement("li"), { textContent: name, className: name }));
    }
  }
  for (const [index, name] of (data.workers ?? []).entries()) {
    const item = Object.assign(document.createElement("li"), { textContent: name });
    item.style.setProperty("--c", `hsl(${hueOf(index)} 65% 48%)`);
    byId("legend").append(item);
  }
  draw();
  fit(0.55);
  const named = decodeURIComponent(location.hash.slice(1)); // page.html#op-name opens at that op
  const start = named && [...ops].find(([, op]) => op.name === named);
  if (start) goTo(start[0]);
  if (named === "unfold") foldAll(true);
  document.documentElement.dataset.ready = "true";
})();

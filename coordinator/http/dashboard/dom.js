// Makes and changes elements. Everything is set as text or attribute: no name from outside can become markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(made, properties, children) {
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.append(String(value));
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const el = (tag, properties = {}, ...children) => fill(document.createElement(tag), properties, children);
export const svg = (tag, properties = {}, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setClass(node, name) {
  if (node.className !== name) node.className = name;
}

// A headed part of a page.
export function section(title, ...children) {
  const heading = el("h2", { text: title });
  const made = el("section", { class: "card" }, heading, ...children);
  heading.id = `h-${title.toLowerCase().replace(/[^a-z]+/g, "-")}`;
  made.setAttribute("aria-labelledby", heading.id);
  return made;
}

// A list of names and values, whose values change in place.
export class Facts {
  constructor(label) {
    this.element = el("dl", { class: "facts", "aria-label": label });
    this.values = new Map();
  }

  show(facts) {
    for (const [name, value] of facts) {
      if (!this.values.has(name)) {
        const dd = el("dd");
        this.values.set(name, dd);
        this.element.append(el("div", {}, el("dt", { text: name }), dd));
      }
      setText(this.values.get(name), String(value));
    }
  }
}

"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const tokenOf = new Map([...data.alphabet].map((character, token) => [character, token]));
const tokens = text => [...text].map(character => tokenOf.get(character));
const hasSteps = data.num_steps > 0;
const hasHalts = data.groups.some(({ puzzles }) => puzzles.some(({ examples }) => examples.some(({ halts }) => halts != null)));
const isColoured = data.cells.some(([, colour]) => colour);
const state = { at: 0, puzzle: 0, step: data.num_steps - 1, onlyFailures: false, symbols: true };

// All text goes in as text, never as HTML: names come from files.
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && key !== "list") made[key] = value;
    else if (value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// What a model's answer is worth.

function isScored(label) { return label !== data.ignored; }
function isLeftOut(scores, cell) { return scores != null && !isScored(scores[cell]); }

function judged(example, step) {
  if (!example.judged) {
    const labels = tokens(example.answer[1]);
    const numScored = labels.filter(isScored).length;
    example.judged = example.steps.map((text, number) => {
      const numRight = tokens(text).filter((token, cell) => isScored(labels[cell]) && token === labels[cell]).length;
      const isExact = numRight === numScored;
      return { numRight, numScored, isExact, isOk: data.checkable ? example.valid[number] : isExact };
    });
  }
  return example.judged[step];
}

const fails = puzzle => puzzle.examples.some(example => !judged(example, data.num_steps - 1).isOk);
const groupFails = group => group.puzzles.some(fails);

function verdict(example, step) {
  const { numRight, numScored, isExact, isOk } = judged(example, step);
  const words = [];
  if (!numScored) words.push("no label to compare with");
  else if (isExact) words.push("right");
  else if (data.checkable) words.push(isOk ? "valid, though not the label" : "not valid");
  else words.push("wrong");
  words.push(`${numRight} of ${numScored} cells right`);
  words.push(`confidence ${(100 * example.confidence[step]).toFixed(1)}\u00a0%`);
  if (example.halts === step) words.push("its Q head would stop here");
  return words.join(", ");
}

// Grids

function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(colour.slice(start, start + 2), 16));
  return (0.299 * red + 0.587 * green + 0.114 * blue) / 255 > 0.4 ? "#000000" : "#ffffff";
}

// Cells that `scores` leaves out stay empty: what stands there, in a label or in an answer, means nothing.
function paint(canvas, width, cells, size, { labels = null, given = null, scores = null } = {}) {
  const style = getComputedStyle(document.documentElement);
  const [ground, ink, soft, line, answered, right] =
    ["--card", "--ink", "--soft", "--line", "--complete", "--running"].map(name => style.getPropertyValue(name));
  const height = cells.length / width;
  const scale = window.devicePixelRatio || 1;
  [canvas.width, canvas.height] = [(width * size + 1) * scale, (height * size + 1) * scale];
  canvas.style.width = `${width * size + 1}px`;
  const draw = canvas.getContext("2d");
  draw.scale(scale, scale);
  draw.textAlign = "center";
  draw.textBaseline = "middle";
  cells.forEach((token, cell) => {
    const [x, y] = [cell % width * size, Math.floor(cell / width) * size];
    const [symbol, colour] = isLeftOut(scores, cell) ? ["", null] : data.cells[token] ?? ["?", null];
    const isWrong = labels !== null && isScored(labels[cell]) && token !== labels[cell];
    draw.fillStyle = colour ?? ground;
    draw.fillRect(x, y, size, size);
    draw.strokeStyle = colour ? "rgba(128, 128, 128, .45)" : line;
    draw.lineWidth = 1;
    draw.strokeRect(x + .5, y + .5, size, size);
    if (state.symbols && size >= 8) {
      const isAnswered = !colour && given !== null && given[cell] !== token;
      if (colour) draw.fillStyle = inkOn(colour);
      else if (isWrong) draw.fillStyle = data.wrong;
      else if (isAnswered) draw.fillStyle = labels === null ? answered : right;
      else draw.fillStyle = isColoured ? soft : ink;
      draw.globalAlpha = colour && /^\d+$/.test(symbol) ? .55 : 1;
      draw.font = `${isAnswered ? "" : "600 "}${Math.round(size * (symbol.length > 2 ? Math.min(.36, 1.4 / symbol.length) : .56))}px system-ui, sans-serif`;
      draw.fillText(symbol, x + size / 2 + .5, y + size / 2 + 1);
      draw.globalAlpha = 1;
    }
    if (isWrong) markWrong(draw, x, y, size);
  });
  if (data.box) parts(draw, ink, width, height, size);
}

// A frame with a corner cut off, on white: to be seen on every colour, also by who cannot tell red from green.
function markWrong(draw, x, y, size) {
  const width = Math.max(1.5, size / 12);
  for (const [colour, inset] of [["#ffffff", 1.9 * width], [data.wrong, width]]) {
    draw.strokeStyle = draw.fillStyle = colour;
    draw.lineWidth = width;
    draw.strokeRect(x + inset / 2 + .5, y + inset / 2 + .5, size - inset, size - inset);
    if (colour !== data.wrong) continue;
    draw.beginPath();
    draw.moveTo(x + size, y);
    draw.lineTo(x + size, y + size * .4);
    draw.lineTo(x + size * .6, y);
    draw.fill();
  }
}

function parts(draw, ink, width, height, size) {
  const [rows, columns] = data.box;
  draw.fillStyle = ink;
  for (let column = 0; column <= width; column += columns) draw.fillRect(Math.max(0, column * size - .5), 0, 1.5, height * size + 1);
  for (let row = 0; row <= height; row += rows) draw.fillRect(0, Math.max(0, row * size - .5), width * size + 1, 1.5);
}

function grid(caption, [width, text], size, options = {}) {
  const cells = tokens(text);
  const canvas = element("canvas", { role: "img", "aria-label": `${caption}: ${cells.length / width} rows, ${width} columns` });
  canvas.addEventListener("mousemove", event => {
    const step = canvas.clientWidth / width;
    const [column, row] = [event.offsetX, event.offsetY].map(place => Math.max(0, Math.floor(place / step)));
    const cell = row * width + Math.min(column, width - 1);
    if (cell >= cells.length) return;
    const named = token => data.cells[token]?.[0].trim() || `token ${token}`;
    const label = options.labels?.[cell];
    const isWrong = label !== undefined && isScored(label) && label !== cells[cell];
    const shown = isLeftOut(options.scores, cell) ? "has no label" : named(cells[cell]);
    canvas.title = `row ${row + 1}, column ${column + 1}: ${shown}${isWrong ? `; the label is ${named(label)}` : ""}`;
  });
  paint(canvas, width, cells, size, options);
  return element("figure", {}, element("figcaption", {}, caption), canvas);
}

// The page

const shown = () => data.groups.filter(group => !state.onlyFailures || groupFails(group));
const nameOf = puzzle => puzzle.name || `puzzle ${puzzle.puzzle}`;

function drawn(example, number) {
  const [asked, answer] = [example.question, example.answer];
  const longest = Math.max(asked[0], answer[0], asked[1].length / asked[0], answer[1].length / answer[0]);
  const size = Math.max(5, Math.min(36, Math.floor((hasSteps ? 264 : 300) / longest)));
  const isSameShape = asked[0] === answer[0] && asked[1].length === answer[1].length;
  const given = isSameShape ? tokens(asked[1]) : null;
  const labels = tokens(answer[1]);
  const scores = labels.some(isScored) ? labels : null;
  const grids = element("div", { className: "grids" },
    grid("question", asked, size), grid(hasSteps ? "label" : "answer", answer, size, { given, scores: labels }));
  const made = element("article", { className: "example" }, element("h3", {}, `example ${example.example}`), grids);
  if (hasSteps) {
    const { isOk } = judged(example, state.step);
    grids.append(grid(`model, step ${state.step + 1}`, [answer[0], example.steps[state.step]], size, { given, labels, scores }));
    made.append(element("p", { className: "verdict" },
      element("span", { className: `mark ${isOk ? "ok" : "bad"}` }, isOk ? "✓" : "✗"), verdict(example, state.step)));
    made.append(strip(example));
  }
  return made;
}

// A bar a step, as high as the model is confident.
function strip(example) {
  return element("div", { className: "strip", "aria-hidden": "true" }, ...example.steps.map((_, step) => element("button", {
    type: "button", tabIndex: -1, title: `step ${step + 1}: ${verdict(example, step)}`,
    className: `${judged(example, step).isOk ? "ok" : ""} ${example.halts === step ? "halts" : ""}`,
    "aria-current": step === state.step, onclick: () => move({ step }),
  }, element("i", { style: `height: ${100 * example.confidence[step]}%` }))));
}

function view(group) {
  const puzzle = group.puzzles[state.puzzle];
  const made = element("section", { id: "view" });
  made.append(element("h2", {}, `Group ${group.group}`));
  if (group.puzzles.length > 1) {
    made.append(element("label", {}, "augmentation ", element("select", {
      id: "puzzle", onchange: event => move({ puzzle: event.target.selectedIndex }),
    }, ...group.puzzles.map((other, number) => element("option", { selected: number === state.puzzle },
      `${hasSteps ? (fails(other) ? "✗ " : "✓ ") : ""}${nameOf(other)}`)))));
  }
  const more = group.num_puzzles > group.puzzles.length ? `, ${group.puzzles.length} of ${group.num_puzzles} puzzles of the group` : "";
  made.append(element("p", { className: "soft" }, `${nameOf(puzzle)}, identifier ${puzzle.identifier}${more}`));
  if (data.num_steps > 1) {
    made.append(element("label", { id: "steps" }, `ACT step ${state.step + 1} of ${data.num_steps}`, element("input", {
      id: "step", type: "range", min: 1, max: data.num_steps, value: state.step + 1, oninput: event => move({ step: event.target.value - 1 }),
    })));
  }
  made.append(...puzzle.examples.map(drawn));
  return made;
}

function bar(groups) {
  const check = (id, text, checked, change) =>
    element("label", {}, element("input", { id, type: "checkbox", checked, onchange: change }), ` ${text}`);
  const made = element("div", { id: "bar" },
    element("span", {}, element("button", { id: "previous", type: "button", onclick: () => move({ at: state.at - 1 }) }, "← previous"), " ",
      element("button", { id: "next", type: "button", onclick: () => move({ at: state.at + 1 }) }, "next →")),
    element("span", { id: "place" }, groups.length ? `${state.at + 1} of ${groups.length}` : "0 of 0"));
  if (hasSteps) made.append(check("failures", "only failures", state.onlyFailures, () => filter()));
  made.append(check("symbols", "symbols", state.symbols, () => move({ symbols: !state.symbols })));
  return made;
}

function list(groups) {
  return element("nav", { id: "list", "aria-label": "groups" }, ...groups.map((group, at) => element("button", {
    type: "button", "aria-current": at === state.at, onclick: () => move({ at }), title: group.puzzles[0].name,
  }, ...(hasSteps ? [element("span", { className: `mark ${groupFails(group) ? "bad" : "ok"}` }, groupFails(group) ? "✗" : "✓")] : []),
  `${group.group}${group.puzzles[0].name ? ` · ${group.puzzles[0].name}` : ""}`)));
}

const keys = [["← →", "groups"], ["a A", "augmentations"], ...(data.num_steps > 1 ? [[", .", "steps"]] : []),
  ...(hasSteps ? [["f", "only failures"]] : []), ["s", "symbols"]];

function render() {
  const groups = shown();
  const focused = document.activeElement?.id;
  const scrolled = document.getElementById("list")?.scrollTop ?? 0;
  const empty = element("section", { id: "view" }, element("p", {}, "No failures among these groups."));
  const help = element("p", { className: "soft" }, "Keys: ", ...keys.flatMap(([key, what], number) =>
    [number ? ", " : "", ...key.split(" ").flatMap(one => [element("kbd", {}, one), " "]), what]), ".");
  const section = groups.length ? view(groups[state.at]) : empty;
  if (hasSteps) section.append(element("p", { className: "soft" },
    "Red frames are cells that differ from the label; what it leaves out is not drawn. A bar is a step, as high as the " +
    `model is confident, green where its answer is right${hasHalts ? "; a blue top is where its Q head would stop" : ""}.`));
  section.append(help);
  document.getElementById("browser").replaceChildren(bar(groups), list(groups), section);
  const items = document.getElementById("list");
  items.scrollTop = scrolled;
  const current = items.querySelector("[aria-current]");
  if (current) {
    if (current.offsetTop < items.scrollTop) items.scrollTop = current.offsetTop - items.offsetTop;
    const below = current.offsetTop + current.offsetHeight - items.offsetTop - items.clientHeight;
    if (below > items.scrollTop) items.scrollTop = below;
  }
  if (focused) document.getElementById(focused)?.focus();
  if (groups.length) history.replaceState(null, "", `#${groups[state.at].group}`);
}

function move(changes) {
  Object.assign(state, changes);
  const groups = shown();
  state.at = Math.max(0, Math.min(groups.length - 1, state.at));
  if ("at" in changes) state.puzzle = 0;
  const numPuzzles = groups.length ? groups[state.at].puzzles.length : 1;
  state.puzzle = (state.puzzle + numPuzzles) % numPuzzles;
  state.step = Math.max(0, Math.min(data.num_steps - 1, state.step));
  render();
}

// The same group stays in view if it is still there.
function filter() {
  const now = shown()[state.at];
  state.onlyFailures = !state.onlyFailures;
  move({ at: Math.max(0, shown().indexOf(now)) });
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("select")) return;
  if (event.target.matches?.("input[type=range]") && event.key.startsWith("Arrow")) return;
  const act = {
    ArrowRight: () => move({ at: state.at + 1 }), ArrowLeft: () => move({ at: state.at - 1 }),
    a: () => move({ puzzle: state.puzzle + 1 }), A: () => move({ puzzle: state.puzzle - 1 }),
    ".": () => move({ step: state.step + 1 }), ",": () => move({ step: state.step - 1 }),
    f: () => hasSteps && filter(), s: () => move({ symbols: !state.symbols }),
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
document.getElementById("about").textContent = data.about;
const asked = data.groups.findIndex(group => `#${group.group}` === location.hash);
move({ at: Math.max(0, asked) });

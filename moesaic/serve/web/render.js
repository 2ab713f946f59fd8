/**
 * A Markdown tree as DOM nodes, and text that grows while it is shown.
 *
 * Only the elements named here can come out, and none of them loads anything: an image is a link to itself.
 */

import { element, icon } from "./dom.js";
import { parse, undecided } from "./markdown.js";

/** @typedef {import("./markdown.js").Block} Block @typedef {import("./markdown.js").Span} Span */

/**
 * Shows a text that may grow. Blocks that can no longer change keep their nodes, so that a long answer costs
 * no more per token than a short one, and what the reader has selected stays selected.
 */
export class MarkdownView {
  /** The text that the settled nodes do not cover begins here. */
  #settled = 0;
  /** @type {HTMLElement[]} the nodes that the next text may replace */
  #tail = [];
  /** @type {Block | null} the block of the last of them */
  #last = null;
  #source = "";
  /** @type {HTMLElement[]} settled, and not taken yet */
  #fresh = [];

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * Shows `source`, which continues what was shown before.
   * @param {string} source
   */
  grow(source) {
    if (source === this.#source) return;
    this.#source = source;
    const rest = source.slice(this.#settled);
    const found = parse(rest);
    const kept = undecided(rest, found);
    if (found.length === 1 && this.#tail.length === 1 && this.#appendCode(found[0].block)) return;
    for (const node of this.#tail) node.remove();
    const nodes = found.map(({ block }) => renderBlock(block));
    this.root.append(...nodes);
    this.#tail = nodes.slice(kept);
    this.#last = found.at(-1)?.block ?? null;
    if (kept > 0) this.#settled += offsetOfLine(rest, found[kept].line);
    this.#fresh.push(...nodes.slice(0, kept));
  }

  /** @returns {HTMLElement[]} the nodes that have been settled since the last call */
  takeSettled() {
    return this.#fresh.splice(0);
  }

  /** @returns {readonly HTMLElement[]} the nodes that are not settled, which is what an answer ends with */
  get tail() {
    return this.#tail;
  }

  /** @param {Block} block @returns {boolean} whether it is the code shown last, and only had to be lengthened */
  #appendCode(block) {
    const last = this.#last;
    if (block.type !== "code" || last?.type !== "code") return false;
    if (block.language !== last.language || !block.text.startsWith(last.text)) return false;
    const code = this.#tail[0].querySelector("code");
    if (!(code?.firstChild instanceof Text)) return false;
    code.firstChild.appendData(block.text.slice(last.text.length));
    this.#last = block;
    return true;
  }
}

/** @param {string} text @param {number} line @returns {number} where this line begins */
function offsetOfLine(text, line) {
  const ends = /\r\n|\r|\n/g;
  for (let passed = 0; passed < line; passed += 1) ends.exec(text);
  return ends.lastIndex;
}

/** @param {Block} block @returns {HTMLElement} */
function renderBlock(block) {
  if (block.type === "code") return renderCode(block.language, block.text);
  if (block.type === "table") return renderTable(block);
  const made = renderFlow(block);
  made.setAttribute("dir", "auto");
  return made;
}

/** @param {Exclude<Block, {type: "code" | "table"}>} block @returns {HTMLElement} */
function renderFlow(block) {
  switch (block.type) {
    case "paragraph":
      return element("p", {}, ...renderSpans(block.spans));
    case "heading":
      // Below the page's own headings: the answer's first level is the page's third.
      return element(/** @type {"h3"} */ (`h${Math.min(6, block.level + 2)}`), {}, ...renderSpans(block.spans));
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(renderBlock));
    case "rule":
      return element("hr");
    case "list":
      return renderList(block);
  }
}

/** @param {Extract<Block, {type: "list"}>} list @returns {HTMLElement} */
function renderList(list) {
  const items = list.items.map((blocks) => element("li", {}, ...blocks.flatMap((block) => renderInItem(block, list.loose))));
  if (!list.ordered) return element("ul", {}, ...items);
  return element("ol", { start: list.start === 1 ? null : String(list.start) }, ...items);
}

/** @param {Block} block @param {boolean} loose @returns {(Node | string)[]} */
function renderInItem(block, loose) {
  if (block.type === "paragraph") {
    const spans = renderSpans(block.spans);
    return loose ? [element("p", {}, ...spans)] : spans;
  }
  return [block.type === "code" || block.type === "table" ? renderBlock(block) : renderFlow(block)];
}

/** @param {string} language @param {string} text @returns {HTMLElement} */
function renderCode(language, text) {
  const copy = element("button", { type: "button", class: "quiet-button", "data-action": "copy-code" }, icon("copy"), "Copy");
  copy.setAttribute("aria-label", "Copy code");
  return element(
    "div",
    { class: "code", dir: "ltr" },
    element("div", { class: "code-head" }, element("span", {}, language || "text"), copy),
    element("pre", { tabindex: "0", role: "region", "aria-label": `Code, ${language || "text"}` }, element("code", {}, text)),
  );
}

/** @param {Extract<Block, {type: "table"}>} table @returns {HTMLElement} */
function renderTable(table) {
  /** @param {"th" | "td"} tag @param {Span[][]} cells */
  const row = (tag, cells) =>
    element(
      "tr",
      {},
      ...cells.map((spans, column) => {
        const align = table.align[column];
        return element(tag, { class: align && `align-${align}` }, ...renderSpans(spans));
      }),
    );
  const body = element("tbody", {}, ...table.rows.map((cells) => row("td", cells)));
  const shown = element("table", { dir: "auto" }, element("thead", {}, row("th", table.head)), body);
  return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, shown);
}

/** @param {Span[]} spans @param {boolean} linked whether they lie in a link @returns {(Node | string)[]} */
const renderSpans = (spans, linked = false) => spans.map((span) => renderSpan(span, linked));

/** @param {Span} span @param {boolean} linked @returns {Node | string} */
function renderSpan(span, linked) {
  switch (span.type) {
    case "text":
      return span.text;
    case "code":
      return element("code", {}, span.text);
    case "break":
      return element("br");
    case "strong":
      return element("strong", {}, ...renderSpans(span.children, linked));
    case "emphasis":
      return element("em", {}, ...renderSpans(span.children, linked));
    case "strike":
      return element("del", {}, ...renderSpans(span.children, linked));
    case "link":
      return link(span.href, renderSpans(span.children, true));
    case "image": {
      const label = `[image: ${span.alt || "without a description"}]`;
      return span.href === null || linked ? label : link(span.href, [label]);
    }
  }
}

/**
 * Returns a link out of the page: it opens beside it and tells the other side nothing of where it came from.
 * @param {string} href with a scheme that `inline.js` lets through
 * @param {(Node | string)[]} children
 * @returns {HTMLElement}
 */
function link(href, children) {
  const attributes = { href, title: href, target: "_blank", rel: "noopener noreferrer", referrerpolicy: "no-referrer" };
  return element("a", attributes, ...children);
}

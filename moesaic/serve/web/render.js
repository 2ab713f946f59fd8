/**
 * Creates DOM nodes from a Markdown tree, and updates them while the text grows.
 *
 * The output has only the elements in this file, and none of them loads anything: an image becomes a link.
 */

import { element, icon } from "./dom.js";
import { firstUnsettled, parse } from "./markdown.js";

/** @typedef {import("./markdown.js").Block} Block @typedef {import("./markdown.js").Span} Span */

/**
 * View of a text that may grow. Blocks that can no longer change keep their nodes. The cost of a token therefore does
 * not depend on the length of the answer, and the reader's selection survives.
 */
export class MarkdownView {
  /** Length of the text that the settled nodes show. */
  #settled = 0;
  /** @type {HTMLElement[]} the nodes that more text may replace */
  #tail = [];
  /** @type {Block | null} the block of the last node */
  #last = null;
  #source = "";
  /** @type {HTMLElement[]} settled nodes that takeSettled() has not returned yet */
  #newlySettled = [];

  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * Shows `source`, which starts with the text shown before.
   * @param {string} source
   */
  grow(source) {
    if (source === this.#source) return;
    this.#source = source;
    const rest = source.slice(this.#settled);
    const parsed = parse(rest);
    const settled = firstUnsettled(rest, parsed);
    if (parsed.length === 1 && this.#tail.length === 1 && this.#appendCode(parsed[0].block)) return;
    for (const node of this.#tail) node.remove();
    const nodes = parsed.map(({ block }) => renderBlock(block));
    this.root.append(...nodes);
    this.#tail = nodes.slice(settled);
    this.#last = parsed.at(-1)?.block ?? null;
    if (settled > 0) this.#settled += offsetOfLine(rest, parsed[settled].line);
    this.#newlySettled.push(...nodes.slice(0, settled));
  }

  /** @returns {HTMLElement[]} the nodes that became settled since the last call */
  takeSettled() {
    return this.#newlySettled.splice(0);
  }

  /** @returns {readonly HTMLElement[]} the nodes at the end that are not settled */
  get tail() {
    return this.#tail;
  }

  /** @param {Block} block @returns {boolean} whether the block continues the last code block and was appended to it */
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

/** @param {string} text @param {number} line @returns {number} the offset at which this line begins */
function offsetOfLine(text, line) {
  const ends = /\r\n|\r|\n/g;
  for (let passed = 0; passed < line; passed += 1) ends.exec(text);
  return ends.lastIndex;
}

/** @param {Block} block @returns {HTMLElement} */
function renderBlock(block) {
  if (block.type === "code") return renderCode(block.language, block.text);
  if (block.type === "table") return renderTable(block);
  const node = renderFlow(block);
  node.setAttribute("dir", "auto");
  return node;
}

/** @param {Exclude<Block, {type: "code" | "table"}>} block @returns {HTMLElement} */
function renderFlow(block) {
  switch (block.type) {
    case "paragraph":
      return element("p", {}, ...renderSpans(block.spans));
    case "heading":
      // The page itself uses h1 and h2, so the answer's first level is h3.
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
  const node = element("table", { dir: "auto" }, element("thead", {}, row("th", table.head)), body);
  return element("div", { class: "table", tabindex: "0", role: "region", "aria-label": "Table" }, node);
}

/** @param {Span[]} spans @param {boolean} linked whether they are inside a link @returns {(Node | string)[]} */
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
 * Returns an external link. It opens a new tab and sends no referrer.
 * @param {string} href with a scheme that `inline.js` allows
 * @param {(Node | string)[]} children
 * @returns {HTMLElement}
 */
function link(href, children) {
  const attributes = { href, title: href, target: "_blank", rel: "noopener noreferrer", referrerpolicy: "no-referrer" };
  return element("a", attributes, ...children);
}

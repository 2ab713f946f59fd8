/**
 * Parser for the text of a Markdown paragraph; it returns a tree of spans and does not know the DOM.
 *
 * It follows CommonMark for code spans, emphasis and links, and GFM for ~~strikethrough~~ and bare URLs. A line end is a
 * line break, because chat models use it that way. HTML is text. The parser is safe for hostile input: it takes linear
 * time, limits nesting, and makes links only of URLs with a safe scheme.
 */

import { emphasize } from "./emphasis.js";

/**
 * @typedef {{type: "text", text: string} | {type: "code", text: string} | {type: "break"}
 *   | {type: "strong" | "emphasis" | "strike", children: Span[]}
 *   | {type: "link", href: string, children: Span[]} | {type: "image", href: string | null, alt: string}} Span
 * @typedef {import("./emphasis.js").Run} Run
 */

const SAFE_SCHEMES = new Set(["http:", "https:", "mailto:"]);
const MAX_OPEN_BRACKETS = 64;
const ESCAPED = /[!-/:-@[-`{-~]/;
const TARGET = /\(\s*(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*))(?:\s+(?:"[^"\n]*"|'[^'\n]*'))?\s*\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`*\[\]{}|\\^\u3000-\u303f\uff00-\uffef]+/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const BREAK = /<br\s{0,3}\/?>/iy;
const ENTITY = /&(?:amp|lt|gt|quot|apos|nbsp|#39);/y;
const EVERY_ENTITY = new RegExp(ENTITY.source, "g");
const ENTITIES = new Map(
  Object.entries({ amp: "&", lt: "<", gt: ">", quot: '"', apos: "'", nbsp: "\u00a0", "#39": "'" }),
);
const SPECIAL = /[\\`*_~!\[\]<&\n]|https?:\/\//g;

/**
 * Returns the normalized URL if it is absolute and has a safe scheme, else null.
 * @param {string} address
 * @returns {string | null}
 */
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return SAFE_SCHEMES.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/**
 * Returns the spans of a paragraph.
 * @param {string} text
 * @returns {Span[]}
 */
export function parseInline(text) {
  return new Inline(text).parse();
}

class Inline {
  #at = 0;
  /** @type {(Span | Run)[]} */
  #nodes = [];
  /** @type {{at: number, image: boolean, source: number}[]} open brackets */
  #brackets = [];

  /** @param {string} text */
  constructor(text) {
    this.text = text;
    /** @type {Map<number, number>} position of the last run of backticks of each length, which may close a code span */
    this.ticks = new Map();
    for (const run of text.matchAll(/`+/g)) this.ticks.set(run[0].length, run.index);
  }

  /** @returns {Span[]} */
  parse() {
    while (this.#at < this.text.length) {
      SPECIAL.lastIndex = this.#at;
      const match = SPECIAL.exec(this.text);
      const next = match ? match.index : this.text.length;
      if (next > this.#at) this.#put(this.text.slice(this.#at, next));
      this.#at = next;
      if (match) this.#special(match[0]);
    }
    return emphasize(this.#nodes);
  }

  /** @param {string} text */
  #put(text) {
    this.#nodes.push({ type: "text", text });
  }

  /** @param {RegExp} pattern with the sticky flag @returns {RegExpExecArray | null} */
  #match(pattern) {
    pattern.lastIndex = this.#at;
    return pattern.exec(this.text);
  }

  /** @param {string} mark */
  #special(mark) {
    if (mark === "\\") this.#escape();
    else if (mark === "`") this.#code();
    else if (mark === "*" || mark === "_" || mark === "~") this.#run(mark);
    else if (mark === "[" || mark === "!") this.#open(mark);
    else if (mark === "]") this.#close();
    else if (mark === "\n") this.#line();
    else if (mark === "<") this.#angle();
    else if (mark === "&") this.#entity();
    else this.#address();
  }

  #escape() {
    const next = this.text[this.#at + 1] ?? "";
    if (next === "\n") this.#at += 1;
    else if (ESCAPED.test(next)) {
      this.#put(next);
      this.#at += 2;
    } else this.#literal(1);
  }

  /** @param {number} count */
  #literal(count) {
    this.#put(this.text.slice(this.#at, this.#at + count));
    this.#at += count;
  }

  #line() {
    this.#nodes.push({ type: "break" });
    this.#at += 1;
    while (this.text[this.#at] === " ") this.#at += 1;
  }

  #code() {
    const ticks = runLength(this.text, this.#at);
    const start = this.#at + ticks;
    let end = start;
    if ((this.ticks.get(ticks) ?? -1) < start) return this.#literal(ticks);
    for (;;) {
      end = this.text.indexOf("`", end);
      const length = runLength(this.text, end);
      if (length === ticks) break;
      end += length;
    }
    let code = this.text.slice(start, end).replaceAll("\n", " ");
    if (code.startsWith(" ") && code.endsWith(" ") && code.trim() !== "") code = code.slice(1, -1);
    this.#nodes.push({ type: "code", text: code });
    this.#at = end + ticks;
  }

  /** @param {string} char */
  #run(char) {
    const count = runLength(this.text, this.#at);
    const before = this.text[this.#at - 1] ?? " ";
    const after = this.text[this.#at + count] ?? " ";
    // Longer runs are rules or drawings. As emphasis they would nest without limit.
    if (char === "~" ? count !== 2 : count > 3) return this.#literal(count);
    const [left, right] = [flanks(before, after), flanks(after, before)];
    // An underscore inside a word is part of an identifier.
    const opens = left && (char !== "_" || !right || isPunctuation(before));
    const closes = right && (char !== "_" || !left || isPunctuation(after));
    this.#nodes.push({ char, count, opens, closes });
    this.#at += count;
  }

  /** @param {string} mark */
  #open(mark) {
    const image = mark === "!";
    if (image && this.text[this.#at + 1] !== "[") return this.#literal(1);
    if (this.#brackets.length >= MAX_OPEN_BRACKETS) this.#brackets.shift();
    this.#brackets.push({ at: this.#nodes.length, image, source: this.#at });
    this.#literal(image ? 2 : 1);
  }

  #close() {
    const bracket = this.#brackets.pop();
    const start = this.#at;
    this.#at += 1;
    const target = bracket && this.#match(TARGET);
    if (!bracket || !target) return this.#put("]");
    this.#at = TARGET.lastIndex;
    const href = safeAddress(decode(target[1] ?? target[2] ?? ""));
    const inside = this.#nodes.splice(bracket.at);
    if (bracket.image) {
      this.#nodes.push({ type: "image", href, alt: this.text.slice(bracket.source + 2, start) });
    } else if (href === null) {
      this.#nodes.push(...inside, { type: "text", text: this.text.slice(start, this.#at) });
    } else {
      this.#nodes.push({ type: "link", href, children: emphasize(inside.slice(1).flatMap(unlink)) });
    }
  }

  #angle() {
    const address = this.#match(ANGLED);
    const href = address && safeAddress(address[1]);
    if (address && href) {
      this.#nodes.push({ type: "link", href, children: [{ type: "text", text: address[1] }] });
      this.#at = ANGLED.lastIndex;
    } else if (this.#match(BREAK)) {
      this.#nodes.push({ type: "break" });
      this.#at = BREAK.lastIndex;
    } else this.#literal(1);
  }

  #entity() {
    const entity = this.#match(ENTITY);
    if (!entity) return this.#literal(1);
    this.#put(decode(entity[0]));
    this.#at = ENTITY.lastIndex;
  }

  #address() {
    let address = this.#match(ADDRESS)?.[0] ?? "";
    address = address.replace(/[.,:;!?_~]{1,50}$/, "");
    if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
    const href = safeAddress(address);
    if (href === null) return this.#literal(address.length || 1);
    this.#nodes.push({ type: "link", href, children: [{ type: "text", text: address }] });
    this.#at += address.length;
  }
}

/** @param {Span | Run} node @returns {(Span | Run)[]} the children of a link, because links cannot be nested */
const unlink = (node) => ("type" in node && node.type === "link" ? node.children : [node]);

/** @param {string} text @param {number} at @returns {number} length of the run of equal characters at `at` */
function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** @param {string} text @returns {string} */
const decode = (text) => text.replace(EVERY_ENTITY, (entity) => ENTITIES.get(entity.slice(1, -1)) ?? "");

/** @param {string} char @returns {boolean} */
const isPunctuation = (char) => /[\p{P}\p{S}]/u.test(char);

/** @param {string} outer @param {string} inner @returns {boolean} whether a run between them is flanking towards `inner`, as CommonMark defines it */
const flanks = (outer, inner) => !/\s/.test(inner) && (!isPunctuation(inner) || /\s/.test(outer) || isPunctuation(outer));

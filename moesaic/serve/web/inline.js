/**
 * The inside of a Markdown paragraph: text in, a tree of spans out. Knows no blocks and no DOM.
 *
 * Follows CommonMark for code spans, emphasis and links, and GFM for ~~strike~~ and bare addresses; a line's
 * end is a line break, as chat models mean it. HTML is text. Made for hostile input: every part is read in
 * one pass, nesting is bounded, and only addresses with a harmless scheme become links.
 */

import { emphasize } from "./emphasis.js";

/**
 * @typedef {{type: "text", text: string} | {type: "code", text: string} | {type: "break"}
 *   | {type: "strong" | "emphasis" | "strike", children: Span[]}
 *   | {type: "link", href: string, children: Span[]} | {type: "image", href: string | null, alt: string}} Span
 * @typedef {import("./emphasis.js").Run} Run
 */

const SCHEMES = new Set(["http:", "https:", "mailto:"]);
const OPEN_BRACKETS = 64;
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
 * Returns the address if it is one that may be followed, else null: an absolute one, with a harmless scheme.
 * @param {string} address
 * @returns {string | null}
 */
export function safeAddress(address) {
  try {
    const url = new URL(address);
    return SCHEMES.has(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/**
 * Returns the spans of a paragraph's text.
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
  /** @type {{at: number, image: boolean, source: number}[]} brackets that opened and have not closed */
  #brackets = [];

  /** @param {string} text */
  constructor(text) {
    this.text = text;
    /** @type {Map<number, number>} where the last run of so many backticks lies: beyond it none can close */
    this.ticks = new Map();
    for (const run of text.matchAll(/`+/g)) this.ticks.set(run[0].length, run.index);
  }

  /** @returns {Span[]} */
  parse() {
    while (this.#at < this.text.length) {
      SPECIAL.lastIndex = this.#at;
      const found = SPECIAL.exec(this.text);
      const next = found ? found.index : this.text.length;
      if (next > this.#at) this.#put(this.text.slice(this.#at, next));
      this.#at = next;
      if (found) this.#special(found[0]);
    }
    return emphasize(this.#nodes);
  }

  /** @param {string} text */
  #put(text) {
    this.#nodes.push({ type: "text", text });
  }

  /** @param {RegExp} pattern a sticky one @returns {RegExpExecArray | null} */
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
    // Longer runs are rules or drawings; taken as emphasis they would nest without bound.
    if (char === "~" ? count !== 2 : count > 3) return this.#literal(count);
    const [left, right] = [flanks(before, after), flanks(after, before)];
    // An underscore inside a word is part of a name.
    const opens = left && (char !== "_" || !right || isPunctuation(before));
    const closes = right && (char !== "_" || !left || isPunctuation(after));
    this.#nodes.push({ char, count, opens, closes });
    this.#at += count;
  }

  /** @param {string} mark */
  #open(mark) {
    const image = mark === "!";
    if (image && this.text[this.#at + 1] !== "[") return this.#literal(1);
    if (this.#brackets.length >= OPEN_BRACKETS) this.#brackets.shift();
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

/** @param {Span | Run} node @returns {(Span | Run)[]} what stands in a link, which holds no other link */
const unlink = (node) => ("type" in node && node.type === "link" ? node.children : [node]);

/** @param {string} text @param {number} at @returns {number} how often the character at `at` is repeated */
function runLength(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

/** @param {string} text @returns {string} */
const decode = (text) => text.replace(EVERY_ENTITY, (found) => ENTITIES.get(found.slice(1, -1)) ?? "");

/** @param {string} char @returns {boolean} */
const isPunctuation = (char) => /[\p{P}\p{S}]/u.test(char);

/** @param {string} outer @param {string} inner @returns {boolean} whether a run between them leans on `inner` */
const flanks = (outer, inner) => !/\s/.test(inner) && (!isPunctuation(inner) || /\s/.test(outer) || isPunctuation(outer));

/**
 * Markdown blocks: text in, a tree out. Knows no DOM; what is inside a paragraph is `inline.js`'s.
 *
 * CommonMark and GFM tables as chat models write them, which is a little more loosely: two spaces are enough
 * to nest a list, a table needs no empty line before it. Left out on purpose: raw HTML (it is text), indented
 * code, underlined headings and link definitions, because each of them would let text that comes later change
 * what is already shown. Made for hostile input: linear in its length, and nesting is bounded.
 */

import { parseInline } from "./inline.js";

/**
 * @typedef {import("./inline.js").Span} Span
 * @typedef {{type: "paragraph", spans: Span[]} | {type: "heading", level: number, spans: Span[]}
 *   | {type: "code", language: string, text: string} | {type: "quote", blocks: Block[]} | {type: "rule"}
 *   | {type: "list", ordered: boolean, start: number, loose: boolean, items: Block[][]}
 *   | {type: "table", align: Align[], head: Span[][], rows: Span[][][]}} Block
 * @typedef {"left" | "center" | "right" | null} Align
 * @typedef {{indent: number, content: number, ordered: boolean, mark: string, number: number, text: string}} Marker
 */

const NESTING = 12;
const COLUMNS = 64;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( *)([-*+]|(\d{1,9})[.)])(?:( +)(.*))?$/;

/**
 * Returns the blocks of a text, each with the number of the line it begins in.
 * @param {string} source
 * @returns {{line: number, block: Block}[]}
 */
export function parse(source) {
  return new Blocks(splitLines(source), 0).parse();
}

/**
 * Returns the place of the first block that may become another one when more text follows.
 *
 * It is the last that begins in a whole line: what begins in the unfinished one may yet turn out to belong to
 * it (a lone "2" becomes "2. next item"), unless an empty line lies between and it is no list.
 * @param {string} source
 * @param {{line: number, block: Block}[]} found what `parse` has found in it
 * @returns {number}
 */
export function undecided(source, found) {
  const lines = splitLines(source);
  const last = found.findLastIndex(({ line }) => line < lines.length - 1);
  const begun = found[last + 1];
  const apart = last >= 0 && begun && found[last].block.type !== "list" && isBlank(lines[begun.line - 1]);
  return apart ? last + 1 : Math.max(0, last);
}

/** @param {string} source @returns {string[]} */
const splitLines = (source) => source.split(/\r\n|\r|\n/);

/** @param {string[]} lines @param {number} depth @returns {Block[]} */
const parseNested = (lines, depth) => new Blocks(lines, depth).parse().map((found) => found.block);

/** @param {string | undefined} line @returns {boolean} */
const isBlank = (line) => line === undefined || /^\s*$/.test(line);

/** @param {string} line @returns {number} */
const indentOf = (line) => line.length - line.replace(/^ +/, "").length;

/** @param {string} text @returns {{type: "paragraph", spans: Span[]}} */
const paragraph = (text) => ({ type: "paragraph", spans: parseInline(text.trim()) });

class Blocks {
  #at = 0;

  /** @param {string[]} lines @param {number} depth how deep in quotes and lists they lie */
  constructor(lines, depth) {
    this.lines = lines;
    this.depth = depth;
  }

  /** @returns {{line: number, block: Block}[]} */
  parse() {
    const found = [];
    while (this.#at < this.lines.length) {
      if (isBlank(this.lines[this.#at])) {
        this.#at += 1;
        continue;
      }
      const line = this.#at;
      found.push({ line, block: this.#next() });
    }
    return found;
  }

  /** @returns {Block} the block that begins in this line */
  #next() {
    const line = this.lines[this.#at];
    return (
      this.#code(line) ??
      this.#heading(line) ??
      this.#rule(line) ??
      (this.depth < NESTING ? (this.#quote(line) ?? this.#list(line)) : null) ??
      this.#table(line) ??
      this.#paragraph()
    );
  }

  /** @param {string} line @returns {Block | null} */
  #code(line) {
    const fence = FENCE.exec(line);
    if (!fence) return null;
    const [, ticks, info] = fence;
    const indent = indentOf(line);
    const first = ++this.#at;
    while (this.#at < this.lines.length && !closes(this.lines[this.#at], ticks)) this.#at += 1;
    const code = this.lines.slice(first, this.#at++);
    const stripped = indent ? code.map((row) => row.slice(Math.min(indentOf(row), indent))) : code;
    return { type: "code", language: info.trim().split(/\s/)[0].slice(0, 40), text: stripped.join("\n") };
  }

  /** @param {string} line @returns {Block | null} */
  #heading(line) {
    const heading = HEADING.exec(line);
    if (!heading) return null;
    this.#at += 1;
    let text = (heading[2] ?? "").trim();
    const bare = text.slice(0, text.length - trailing(text, "#"));
    if (bare === "" || bare.endsWith(" ")) text = bare;
    return { type: "heading", level: heading[1].length, spans: parseInline(text.trim()) };
  }

  /** @param {string} line @returns {Block | null} */
  #rule(line) {
    if (!RULE.test(line)) return null;
    this.#at += 1;
    return { type: "rule" };
  }

  /** @param {string} line @returns {Block | null} */
  #quote(line) {
    if (!QUOTE.test(line)) return null;
    const inside = [];
    while (this.#at < this.lines.length && QUOTE.test(this.lines[this.#at])) {
      inside.push(this.lines[this.#at++].replace(QUOTE, ""));
    }
    return { type: "quote", blocks: parseNested(inside, this.depth + 1) };
  }

  /** @param {string} line @returns {Block | null} */
  #list(line) {
    const first = readMarker(line);
    if (!first) return null;
    const items = [];
    let loose = false;
    let marker = /** @type {Marker | null} */ (first);
    while (marker) {
      const { lines, gap } = this.#item(marker, first.indent);
      items.push(parseNested(lines, this.depth + 1));
      marker = this.#sibling(first);
      loose ||= gap.inside || (gap.after && marker !== null);
    }
    return { type: "list", ordered: first.ordered, start: first.number, loose, items };
  }

  /**
   * Takes the lines of one item.
   * @param {Marker} marker
   * @param {number} indent the list's
   * @returns {{lines: string[], gap: {inside: boolean, after: boolean}}} and where there were empty lines
   */
  #item(marker, indent) {
    const lines = [marker.text];
    let blanks = 0;
    let inside = false;
    for (this.#at += 1; this.#at < this.lines.length; this.#at += 1) {
      const line = this.lines[this.#at];
      if (isBlank(line)) {
        blanks += 1;
        continue;
      }
      const depth = indentOf(line);
      const belongs = depth >= indent + 2;
      if (!belongs && (blanks > 0 || isBlank(lines.at(-1)) || this.#begins(line) || readMarker(line))) break;
      // An empty line inside a nested list or between its items does not spread this one's items.
      inside ||= blanks > 0 && depth <= marker.content && !readMarker(line);
      for (; blanks > 0; blanks -= 1) lines.push("");
      lines.push(line.slice(Math.min(depth, marker.content)));
    }
    return { lines, gap: { inside, after: blanks > 0 } };
  }

  /** @param {Marker} first @returns {Marker | null} the marker of the list's next item, if this line has one */
  #sibling(first) {
    const line = this.lines[this.#at];
    const marker = line === undefined || RULE.test(line) ? null : readMarker(line);
    return marker && marker.mark === first.mark && marker.indent < first.indent + 2 ? marker : null;
  }

  /** @param {string} line @returns {Block | null} */
  #table(line) {
    const align = this.#alignment(line);
    if (!align) return null;
    const head = cells(line).map(parseInline);
    const rows = [];
    for (this.#at += 2; this.#at < this.lines.length; this.#at += 1) {
      const row = this.lines[this.#at];
      if (isBlank(row) || this.#begins(row)) break;
      rows.push(cells(row).slice(0, head.length).map(parseInline));
    }
    return { type: "table", align, head, rows };
  }

  /** @param {string} line @returns {Align[] | null} the columns, if this line is a table's head */
  #alignment(line) {
    const below = this.lines[this.#at + 1];
    if (below === undefined || !line.includes("|") || !below.includes("-")) return null;
    const marks = cells(below);
    const fits = marks.length <= COLUMNS && marks.length === cells(line).length && (marks.length > 1 || below.includes("|"));
    if (!fits || !marks.every((mark) => /^:?-+:?$/.test(mark))) return null;
    return marks.map((mark) => {
      if (mark.endsWith(":")) return mark.startsWith(":") ? "center" : "right";
      return mark.startsWith(":") ? "left" : null;
    });
  }

  /** @returns {Block} */
  #paragraph() {
    const first = this.#at++;
    while (this.#at < this.lines.length) {
      const line = this.lines[this.#at];
      if (isBlank(line) || this.#begins(line) || this.#alignment(line)) break;
      this.#at += 1;
    }
    return paragraph(this.lines.slice(first, this.#at).map((line) => line.trim()).join("\n"));
  }

  /** @param {string} line @returns {boolean} whether it ends a paragraph, being the beginning of something else */
  #begins(line) {
    if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
    if (this.depth >= NESTING) return false;
    const marker = readMarker(line);
    return QUOTE.test(line) || (marker !== null && marker.text !== "" && (!marker.ordered || marker.number === 1));
  }
}

/** @param {string} line @returns {Marker | null} */
function readMarker(line) {
  const found = MARKER.exec(line);
  if (!found || RULE.test(line)) return null;
  const [, space, mark, digits, gap = " ", text = ""] = found;
  return {
    indent: space.length,
    content: space.length + mark.length + (gap.length > 4 ? 1 : gap.length),
    ordered: digits !== undefined,
    mark: digits === undefined ? mark : /** @type {string} */ (mark.at(-1)),
    number: Number(digits ?? 0),
    text,
  };
}

/** @param {string} line @param {string} ticks @returns {boolean} whether the line ends the code that `ticks` began */
function closes(line, ticks) {
  const found = line.trim();
  return found.length >= ticks.length && indentOf(line) < 4 && trailing(found, ticks[0]) === found.length;
}

/** @param {string} line @returns {string[]} the cells of a table's row */
function cells(line) {
  const row = line.trim();
  const found = [];
  let from = row.startsWith("|") ? 1 : 0;
  for (let at = from; at < row.length; at += 1) {
    if (row[at] === "\\") at += 1;
    else if (row[at] === "|") {
      found.push(row.slice(from, at));
      from = at + 1;
    }
  }
  if (from < row.length) found.push(row.slice(from));
  return found.map((cell) => cell.replaceAll("\\|", "|").trim());
}

/** @param {string} text @param {string} char @returns {number} how often `char` stands at the end */
function trailing(text, char) {
  let count = 0;
  while (count < text.length && text[text.length - 1 - count] === char) count += 1;
  return count;
}

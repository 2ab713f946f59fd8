/**
 * Parser for Markdown blocks; it returns a tree and does not know the DOM. `inline.js` parses the text of paragraphs.
 *
 * It reads CommonMark and GFM tables with two relaxations for chat models: two spaces are enough to nest a list, and a
 * table needs no empty line before it. Not supported are raw HTML (it is text), indented code, underlined headings and
 * link definitions: with them, later text could change what is already shown. The parser is safe for hostile input: it
 * takes linear time and limits nesting.
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

const MAX_NESTING = 12;
const MAX_COLUMNS = 64;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}([-*_])(?:[ \t]*\1){2,}[ \t]*$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( *)([-*+]|(\d{1,9})[.)])(?:( +)(.*))?$/;

/**
 * Returns the blocks of a text, each with the number of its first line.
 * @param {string} source
 * @returns {{line: number, block: Block}[]}
 */
export function parse(source) {
  return new Blocks(splitLines(source), 0).parse();
}

/**
 * Returns the index of the first block that more text may change.
 *
 * This is the last block that begins before the last line. The text in the last line may turn out to belong to that block
 * (a lone "2" becomes "2. next item"), unless an empty line separates them and the block is not a list.
 * @param {string} source
 * @param {{line: number, block: Block}[]} blocks the result of `parse`
 * @returns {number}
 */
export function firstUnsettled(source, blocks) {
  const lines = splitLines(source);
  const last = blocks.findLastIndex(({ line }) => line < lines.length - 1);
  const next = blocks[last + 1];
  const separate = last >= 0 && next && blocks[last].block.type !== "list" && isBlank(lines[next.line - 1]);
  return separate ? last + 1 : Math.max(0, last);
}

/** @param {string} source @returns {string[]} */
const splitLines = (source) => source.split(/\r\n|\r|\n/);

/** @param {string[]} lines @param {number} depth @returns {Block[]} */
const parseNested = (lines, depth) => new Blocks(lines, depth).parse().map(({ block }) => block);

/** @param {string | undefined} line @returns {boolean} */
const isBlank = (line) => line === undefined || /^\s*$/.test(line);

/** @param {string} line @returns {number} */
const indentOf = (line) => line.length - line.replace(/^ +/, "").length;

/** @param {string} text @returns {{type: "paragraph", spans: Span[]}} */
const paragraph = (text) => ({ type: "paragraph", spans: parseInline(text.trim()) });

class Blocks {
  #at = 0;

  /** @param {string[]} lines @param {number} depth number of enclosing quotes and lists */
  constructor(lines, depth) {
    this.lines = lines;
    this.depth = depth;
  }

  /** @returns {{line: number, block: Block}[]} */
  parse() {
    const blocks = [];
    while (this.#at < this.lines.length) {
      if (isBlank(this.lines[this.#at])) {
        this.#at += 1;
        continue;
      }
      const line = this.#at;
      blocks.push({ line, block: this.#next() });
    }
    return blocks;
  }

  /** @returns {Block} the block that begins at the current line */
  #next() {
    const line = this.lines[this.#at];
    return (
      this.#code(line) ??
      this.#heading(line) ??
      this.#rule(line) ??
      (this.depth < MAX_NESTING ? (this.#quote(line) ?? this.#list(line)) : null) ??
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
   * Reads the lines of one list item.
   * @param {Marker} marker
   * @param {number} indent of the list
   * @returns {{lines: string[], gap: {inside: boolean, after: boolean}}} `gap` says where there were empty lines
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
      // An empty line inside a nested list does not make this list loose.
      inside ||= blanks > 0 && depth <= marker.content && !readMarker(line);
      for (; blanks > 0; blanks -= 1) lines.push("");
      lines.push(line.slice(Math.min(depth, marker.content)));
    }
    return { lines, gap: { inside, after: blanks > 0 } };
  }

  /** @param {Marker} first @returns {Marker | null} the marker of the next item of the list; null if the line has none */
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

  /** @param {string} line @returns {Align[] | null} the alignment of the columns if this line is the header of a table */
  #alignment(line) {
    const below = this.lines[this.#at + 1];
    if (below === undefined || !line.includes("|") || !below.includes("-")) return null;
    const marks = cells(below);
    const fits = marks.length <= MAX_COLUMNS && marks.length === cells(line).length && (marks.length > 1 || below.includes("|"));
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

  /** @param {string} line @returns {boolean} whether the line begins a new block and so ends a paragraph */
  #begins(line) {
    if (FENCE.test(line) || HEADING.test(line) || RULE.test(line)) return true;
    if (this.depth >= MAX_NESTING) return false;
    const marker = readMarker(line);
    return QUOTE.test(line) || (marker !== null && marker.text !== "" && (!marker.ordered || marker.number === 1));
  }
}

/** @param {string} line @returns {Marker | null} */
function readMarker(line) {
  const match = MARKER.exec(line);
  if (!match || RULE.test(line)) return null;
  const [, space, mark, digits, gap = " ", text = ""] = match;
  return {
    indent: space.length,
    content: space.length + mark.length + (gap.length > 4 ? 1 : gap.length),
    ordered: digits !== undefined,
    mark: digits === undefined ? mark : /** @type {string} */ (mark.at(-1)),
    number: Number(digits ?? 0),
    text,
  };
}

/** @param {string} line @param {string} ticks @returns {boolean} whether the line closes the code fence `ticks` */
function closes(line, ticks) {
  const fence = line.trim();
  return fence.length >= ticks.length && indentOf(line) < 4 && trailing(fence, ticks[0]) === fence.length;
}

/** @param {string} line @returns {string[]} the cells of a table row */
function cells(line) {
  const row = line.trim();
  const parts = [];
  let from = row.startsWith("|") ? 1 : 0;
  for (let at = from; at < row.length; at += 1) {
    if (row[at] === "\\") at += 1;
    else if (row[at] === "|") {
      parts.push(row.slice(from, at));
      from = at + 1;
    }
  }
  if (from < row.length) parts.push(row.slice(from));
  return parts.map((cell) => cell.replaceAll("\\|", "|").trim());
}

/** @param {string} text @param {string} char @returns {number} number of `char` at the end of the text */
function trailing(text, char) {
  let count = 0;
  while (count < text.length && text[text.length - 1 - count] === char) count += 1;
  return count;
}

/**
 * Server-sent events out of bytes that come in arbitrary pieces (HTML standard, section 9.2.6).
 * Knows only the field `data`: the API names no events.
 */

import { BadReply } from "./errors.js";

/** Characters of one event; more is no event of this API. */
const LONGEST = 16 << 20;

/** Collects the bytes of one connection and returns the data of each whole event. */
export class Events {
  #decoder = new TextDecoder("utf-8", { fatal: true }); // carries a character that is split between two pieces
  #rest = "";
  /** @type {string[]} */
  #data = [];
  #size = 0;

  /** @param {Uint8Array} bytes @returns {string[]} */
  feed(bytes) {
    const text = this.#rest + this.#decoded(bytes);
    // A carriage return at the very end may be half of a line's end: it waits for what follows.
    const usable = text.endsWith("\r") ? text.slice(0, -1) : text;
    const lines = usable.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + text.slice(usable.length);
    if (this.#rest.length + this.#size > LONGEST) throw new BadReply("the server sent an event of more than 16 MiB");
    return lines.map((line) => this.#line(line)).filter((data) => data !== null);
  }

  /** @param {Uint8Array} bytes */
  #decoded(bytes) {
    try {
      return this.#decoder.decode(bytes, { stream: true });
    } catch {
      throw new BadReply("the server sent an event that is no UTF-8");
    }
  }

  /** @param {string} line a field, a comment, or nothing, which ends an event */
  #line(line) {
    if (line !== "") {
      if (!/^data(:|$)/.test(line)) return null;
      const value = line.slice(5).replace(/^ /, "");
      this.#data.push(value);
      this.#size += value.length;
      return null;
    }
    if (this.#data.length === 0) return null;
    const whole = this.#data.join("\n");
    this.#data = [];
    this.#size = 0;
    return whole;
  }
}

/**
 * Incremental parser for server-sent events (HTML standard, section 9.2.6).
 * It returns the field `data` and ignores all others: the API does not use event names or ids.
 */

import { BadReply } from "./errors.js";

/** A longer event is an error: no API sends one. */
const MAX_EVENT_CHARACTERS = 16 << 20;

/** Parser for the bytes of one connection; it returns the data of each complete event. */
export class EventParser {
  #decoder = new TextDecoder("utf-8", { fatal: true }); // keeps a character that is split between two chunks
  #rest = "";
  /** @type {string[]} */
  #data = [];
  #size = 0;

  /**
   * Returns the data of the events that this chunk completes.
   * @param {Uint8Array} chunk
   * @returns {string[]}
   */
  feed(chunk) {
    const text = this.#rest + this.#decode(chunk);
    // A carriage return at the end may be the first half of "\r\n", so it waits for the next chunk.
    const usable = text.endsWith("\r") ? text.slice(0, -1) : text;
    const lines = usable.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + text.slice(usable.length);
    if (this.#rest.length + this.#size > MAX_EVENT_CHARACTERS) throw new BadReply("the server sent an event of more than 16 MiB");
    return lines.map((line) => this.#parseLine(line)).filter((data) => data !== null);
  }

  /** @param {Uint8Array} chunk */
  #decode(chunk) {
    try {
      return this.#decoder.decode(chunk, { stream: true });
    } catch {
      throw new BadReply("the server sent an event that is not valid UTF-8");
    }
  }

  /**
   * Returns the data of the event that this line ends, else null.
   * @param {string} line a field, a comment, or an empty line, which ends an event
   */
  #parseLine(line) {
    if (line !== "") {
      if (!/^data(:|$)/.test(line)) return null;
      const value = line.slice(5).replace(/^ /, "");
      this.#data.push(value);
      this.#size += value.length;
      return null;
    }
    if (this.#data.length === 0) return null;
    const event = this.#data.join("\n");
    this.#data = [];
    this.#size = 0;
    return event;
  }
}

/**
 * Server-sent events out of text that arrives in arbitrary pieces (HTML standard, section 9.2.6).
 * Knows only the `data` field: the API uses no event names, ids or retry times.
 */

/** Collects pieces of a stream and hands out the data of each whole event. */
export class EventParser {
  #rest = "";
  /** @type {string[]} */
  #data = [];

  /**
   * Takes the next piece and returns the data of the events that it completes.
   * @param {string} piece
   * @returns {string[]}
   */
  push(piece) {
    const text = this.#rest + piece;
    // A carriage return at the very end may be half of a CRLF: it waits for what follows.
    const usable = text.endsWith("\r") ? text.slice(0, -1) : text;
    const lines = usable.split(/\r\n|\n|\r/);
    this.#rest = lines.pop() + text.slice(usable.length);
    const events = [];
    for (const line of lines) {
      if (line !== "") {
        this.#field(line);
      } else if (this.#data.length > 0) {
        events.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
    return events;
  }

  /** @param {string} line a field, or a comment, which begins with a colon */
  #field(line) {
    if (!/^data(:|$)/.test(line)) return;
    this.#data.push(line.slice(5).replace(/^ /, ""));
  }
}

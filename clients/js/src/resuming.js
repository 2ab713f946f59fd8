/**
 * One streamed answer, over as many connections as it takes.
 *
 * A server that honours idempotency keys says so in the header `idempotency-replayed` of each answer, and tells the
 * same answer from its start when it is asked again under the same key. What was handed out already is compared and
 * left out: whoever reads sees one answer, or an error, never the halves of two. Knows no connections.
 */

import { AnswerChanged, BadReply, ConnectionFailed, MoesaicError, StreamBroken } from "./errors.js";
import { Events } from "./events.js";
import { answerOf, eventError, pieces, read } from "./replies.js";

const REPLAYED = "idempotency-replayed";
const changed = () => new AnswerChanged("asked for the rest of an answer, the server told another one: ask anew");

/** One text of an answer: what was handed out, and how far a replay has come in it. */
class Strand {
  text = "";
  #told = "";
  #at = 0;

  /** Whether a replay has not come as far as what was handed out. */
  get behind() {
    return this.#at < this.#told.length;
  }

  /** Expects everything once more. */
  rewind() {
    this.#told = this.text;
    this.#at = 0;
  }

  /** Returns what of a piece is new. @param {string} text */
  add(text) {
    const known = this.#told.slice(this.#at, this.#at + text.length);
    if (!text.startsWith(known)) throw changed();
    this.#at += known.length;
    const added = text.slice(known.length);
    this.text += added;
    return added;
  }
}

/** One of the `n` answers, as far as it has come. */
class Choice {
  text = new Strand();
  /** @type {Map<number, {id: string, name: string, arguments: Strand, again: boolean}>} */
  calls = new Map();
  logprobs = [];
  /** @type {string | null} */
  reason = null;
  #scored = 0; // log-probabilities that this connection has told

  get behind() {
    const calls = [...this.calls.values()].some((call) => call.arguments.behind || !call.again);
    return calls || this.text.behind || this.#scored < this.logprobs.length;
  }

  rewind() {
    this.text.rewind();
    for (const call of this.calls.values()) {
      call.arguments.rewind();
      call.again = false;
    }
    this.#scored = 0;
  }

  /** Returns what of a piece is new; null: nothing. @param {any} piece */
  add(piece) {
    const text = this.text.add(piece.text);
    const calls = piece.calls.map((part) => this.#call(part)).filter((part) => part !== null);
    const logprobs = piece.logprobs.slice(Math.max(0, this.logprobs.length - this.#scored));
    this.#scored += piece.logprobs.length;
    this.logprobs.push(...logprobs);
    const reason = piece.reason === null ? null : this.#ended(piece.reason);
    if (text === "" && calls.length === 0 && logprobs.length === 0 && reason === null) return null;
    return { ...piece, text, calls, logprobs, reason };
  }

  /** @param {any} part */
  #call(part) {
    const known = this.calls.get(part.place);
    if (known === undefined) {
      const call = { id: part.id, name: part.name, arguments: new Strand(), again: true };
      this.calls.set(part.place, call);
      call.arguments.add(part.arguments);
      return part;
    }
    if ((part.id && part.id !== known.id) || (part.name && part.name !== known.name)) throw changed();
    known.again = true;
    const added = known.arguments.add(part.arguments);
    return added === "" ? null : { place: part.place, id: "", name: "", arguments: added };
  }

  /** @param {string} reason */
  #ended(reason) {
    if (this.behind || (this.reason !== null && this.reason !== reason)) throw changed();
    const known = this.reason;
    this.reason = reason;
    return known === null ? reason : null;
  }

  /** @param {any} raw @param {any} usage */
  answer(raw, usage) {
    const calls = [...this.calls].sort(([a], [b]) => a - b);
    return answerOf({
      text: this.text.text,
      reason: this.reason,
      usage,
      calls: calls.map(([, { id, name, arguments: strand }]) => ({ id, name, arguments: strand.text })),
      logprobs: this.logprobs.length > 0 ? this.logprobs : null,
      raw,
    });
  }
}

/** The course of one streamed answer: bytes of its connections in, its pieces out. */
export class Course {
  done = false;
  resumed = 0;
  /** @type {Map<number, Choice>} */
  #choices = new Map();
  #events = new Events();
  #ready = [];
  /** @type {MoesaicError | null} */
  #error = null;
  #usage = null;
  #head = {};
  /** @type {string | null} */
  #requestId = null;
  #begun = false;
  #resumable = false;

  /** What has come of the first answer. */
  get text() {
    return this.#choices.get(0)?.text.text ?? "";
  }

  /** Takes up a connection that begins to tell the answer. @param {Headers} headers */
  opened(headers) {
    if (!/^text\/event-stream/i.test(headers.get("content-type") ?? "")) {
      throw new BadReply("a stream was asked for, and the server sent something else");
    }
    this.#resumable = headers.has(REPLAYED);
    if (this.#begun) {
      if (!this.#resumable) {
        throw new StreamBroken("an answer broke off, and the server that was asked for the rest does not know it");
      }
      this.resumed += 1;
    }
    this.#requestId = headers.get("x-request-id");
    this.#events = new Events();
    for (const choice of this.#choices.values()) choice.rewind();
  }

  /** Takes bytes; returns whether they brought something new. @param {Uint8Array} bytes */
  feed(bytes) {
    this.#begun ||= bytes.length > 0;
    const before = this.#ready.length;
    try {
      for (const event of this.#events.feed(bytes)) {
        if (this.done) break;
        this.#event(event);
      }
    } catch (error) {
      if (!(error instanceof MoesaicError)) throw error;
      this.#error = error; // after what came before it
    }
    return this.done || this.#error !== null || this.#ready.length > before;
  }

  /** Returns the next piece; undefined: there is none yet. */
  take() {
    if (this.#ready.length > 0) return this.#ready.shift();
    if (this.#error) throw this.#error;
    return undefined;
  }

  /**
   * Returns the error that a failed try is, if no further one makes it good; throws where none can.
   * @param {any} cause
   */
  failed(cause) {
    if (!this.#begun || !(cause instanceof ConnectionFailed)) return cause;
    if (!this.#resumable) {
      throw new StreamBroken(`the answer broke off (${cause.message}), and this server cannot go on with it`, { cause });
    }
    return new StreamBroken(`the answer broke off (${cause.message}), and the server could not be asked for the rest`, {
      cause,
    });
  }

  /** Returns the whole answer. */
  answer() {
    if (!this.done) throw new StreamBroken("the stream was left before its end: there is no whole answer");
    const [first, ...alternatives] = [...this.#choices]
      .sort(([a], [b]) => a - b)
      .map(([, choice]) => choice.answer(this.#head, this.#usage));
    return { ...first, requestId: this.#requestId, alternatives };
  }

  /** @param {string} data */
  #event(data) {
    if (data === "[DONE]") {
      this.#end();
      return;
    }
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new BadReply("the server sent an event that is no JSON");
    }
    if (chunk?.error) {
      const error = eventError(chunk);
      error.requestId = this.#requestId;
      throw error;
    }
    for (const piece of read(pieces, chunk)) {
      const choice = this.#choices.get(piece.index) ?? new Choice();
      this.#choices.set(piece.index, choice);
      const added = choice.add(piece);
      if (added) this.#ready.push(added);
    }
    this.#usage = chunk.usage ?? this.#usage;
    this.#head = { ...this.#head, ...chunk };
  }

  #end() {
    const choices = [...this.#choices.values()];
    if (choices.some((choice) => choice.behind)) throw changed();
    if (choices.length === 0 || choices.some((choice) => choice.reason === null)) {
      throw new BadReply("the server ended a stream without saying why the answer ends");
    }
    this.done = true;
  }
}

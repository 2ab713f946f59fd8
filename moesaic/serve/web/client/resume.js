/**
 * Resumption of a streamed answer that breaks: one answer over several connections.
 *
 * A server that supports idempotency keys sends the header `idempotency-replayed` with each answer. If the request is
 * repeated under the same key, it replays the same answer from the start. This module compares the replay with the
 * text that it has already returned and skips that part. The caller sees one answer or an error, never parts of two
 * answers. This module does no network I/O.
 */

import { AnswerChanged, BadReply, ConnectionFailed, MoesaicError, StreamBroken } from "./errors.js";
import { EventParser } from "./events.js";
import { completeAnswer, eventError, parse, parsePieces } from "./responses.js";

const REPLAYED_HEADER = "idempotency-replayed";
const changed = () => new AnswerChanged("the server sent a different answer when the stream was resumed; send a new request");

/** One text of an answer: the part already returned, and the position of a replay within it. */
class ReplayedText {
  text = "";
  #expected = "";
  #position = 0;

  /** Whether the replay has not yet repeated all of the text that was returned. */
  get incomplete() {
    return this.#position < this.#expected.length;
  }

  /** Expects a replay from the start. */
  rewind() {
    this.#expected = this.text;
    this.#position = 0;
  }

  /** Returns the new part of `text`. @param {string} text */
  add(text) {
    const expected = this.#expected.slice(this.#position, this.#position + text.length);
    if (!text.startsWith(expected)) throw changed();
    this.#position += expected.length;
    const added = text.slice(expected.length);
    this.text += added;
    return added;
  }
}

/** One of the `n` answers of a request, as received until now. */
class ReplayedChoice {
  text = new ReplayedText();
  /**
   * `replayed`: whether the current connection has sent the call.
   * @type {Map<number, {id: string, name: string, arguments: ReplayedText, replayed: boolean}>}
   */
  calls = new Map();
  logprobs = [];
  /** @type {string | null} */
  reason = null;
  #replayedLogprobs = 0; // number of log-probabilities that the current connection has sent

  /** Whether the replay has not yet repeated everything that was returned. */
  get incomplete() {
    const calls = [...this.calls.values()].some((call) => call.arguments.incomplete || !call.replayed);
    return calls || this.text.incomplete || this.#replayedLogprobs < this.logprobs.length;
  }

  /** Expects a replay from the start. */
  rewind() {
    this.text.rewind();
    for (const call of this.calls.values()) {
      call.arguments.rewind();
      call.replayed = false;
    }
    this.#replayedLogprobs = 0;
  }

  /** Returns the new part of a piece; null if nothing is new. @param {any} piece */
  add(piece) {
    const text = this.text.add(piece.text);
    const calls = piece.calls.map((part) => this.#addCall(part)).filter((part) => part !== null);
    const logprobs = piece.logprobs.slice(Math.max(0, this.logprobs.length - this.#replayedLogprobs));
    this.#replayedLogprobs += piece.logprobs.length;
    this.logprobs.push(...logprobs);
    const reason = piece.reason === null ? null : this.#finish(piece.reason);
    if (text === "" && calls.length === 0 && logprobs.length === 0 && reason === null) return null;
    return { ...piece, text, calls, logprobs, reason };
  }

  /** @param {any} part */
  #addCall(part) {
    const call = this.calls.get(part.place);
    if (call === undefined) {
      const text = new ReplayedText();
      text.add(part.arguments);
      this.calls.set(part.place, { id: part.id, name: part.name, arguments: text, replayed: true });
      return part;
    }
    if ((part.id && part.id !== call.id) || (part.name && part.name !== call.name)) throw changed();
    call.replayed = true;
    const added = call.arguments.add(part.arguments);
    return added === "" ? null : { place: part.place, id: "", name: "", arguments: added };
  }

  /** @param {string} reason */
  #finish(reason) {
    if (this.incomplete || (this.reason !== null && this.reason !== reason)) throw changed();
    const previous = this.reason;
    this.reason = reason;
    return previous === null ? reason : null;
  }

  /** @param {any} raw @param {any} usage */
  answer(raw, usage) {
    const calls = [...this.calls].sort(([a], [b]) => a - b);
    return completeAnswer({
      text: this.text.text,
      reason: this.reason,
      usage,
      calls: calls.map(([, call]) => ({ id: call.id, name: call.name, arguments: call.arguments.text })),
      logprobs: this.logprobs.length > 0 ? this.logprobs : null,
      raw,
    });
  }
}

/** Parser of one streamed answer: takes the bytes of its connections, returns its pieces. */
export class ResumableStream {
  /** Whether the answer is complete. */
  done = false;
  /** Number of times that a new connection continued the answer. */
  resumed = 0;
  /** Whether the server can replay the answer. */
  resumable = false;
  /** Latest token counts that the server reported. @type {any} */
  usage = null;
  /** @type {Map<number, ReplayedChoice>} */
  #choices = new Map();
  #parser = new EventParser();
  #ready = [];
  /** @type {MoesaicError | null} */
  #error = null;
  #raw = {};
  /** @type {string | null} */
  #requestId = null;
  #begun = false;

  /** The text of the first answer, as received until now. */
  get text() {
    return this.#choices.get(0)?.text.text ?? "";
  }

  /** Starts to parse the response of a new connection. @param {Headers} headers */
  startConnection(headers) {
    if (!/^text\/event-stream/i.test(headers.get("content-type") ?? "")) {
      throw new BadReply("the request was for a stream, and the response is not an event stream");
    }
    this.resumable = headers.has(REPLAYED_HEADER);
    if (this.#begun) {
      if (!this.resumable) throw new StreamBroken("the answer broke off, and the server no longer has it");
      this.resumed += 1;
    }
    this.#requestId = headers.get("x-request-id");
    this.#parser = new EventParser();
    for (const choice of this.#choices.values()) choice.rewind();
  }

  /**
   * Parses a chunk and returns whether it brought anything new. `take` then returns the new pieces.
   * @param {Uint8Array} chunk
   */
  feed(chunk) {
    this.#begun ||= chunk.length > 0;
    const before = this.#ready.length;
    try {
      for (const event of this.#parser.feed(chunk)) {
        if (this.done) break;
        this.#handleEvent(event);
      }
    } catch (error) {
      if (!(error instanceof MoesaicError)) throw error;
      this.#error = error; // thrown by take(), after the pieces that came before it
    }
    return this.done || this.#error !== null || this.#ready.length > before;
  }

  /** Returns the next piece; undefined if more bytes are needed. Throws the error that the server sent. */
  take() {
    if (this.#ready.length > 0) return this.#ready.shift();
    if (this.#error) throw this.#error;
    return undefined;
  }

  /**
   * Returns the error to throw if no further try succeeds after `cause`. Throws if a further try cannot help.
   * @param {any} cause
   */
  failure(cause) {
    if (!this.#begun || !(cause instanceof ConnectionFailed)) return cause;
    if (!this.resumable) {
      throw new StreamBroken(`the answer broke off (${cause.message}), and this server cannot resume it`, { cause });
    }
    return new StreamBroken(`the answer broke off (${cause.message}), and it could not be resumed`, { cause });
  }

  /** Returns the complete answer. */
  answer() {
    if (!this.done) throw new StreamBroken("the stream ended early, so the answer is not complete");
    const [first, ...alternatives] = [...this.#choices]
      .sort(([a], [b]) => a - b)
      .map(([, choice]) => choice.answer(this.#raw, this.usage));
    return { ...first, requestId: this.#requestId, alternatives };
  }

  /** @param {string} data */
  #handleEvent(data) {
    if (data === "[DONE]") {
      this.#finish();
      return;
    }
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new BadReply("the server sent an event that is not valid JSON");
    }
    if (chunk?.error) {
      const error = eventError(chunk);
      error.requestId = this.#requestId;
      throw error;
    }
    for (const piece of parse(parsePieces, chunk)) {
      const choice = this.#choices.get(piece.index) ?? new ReplayedChoice();
      this.#choices.set(piece.index, choice);
      const added = choice.add(piece);
      if (added) this.#ready.push(added);
    }
    this.usage = chunk.usage ?? this.usage;
    this.#raw = { ...this.#raw, ...chunk };
  }

  #finish() {
    const choices = [...this.#choices.values()];
    if (choices.some((choice) => choice.incomplete)) throw changed();
    if (choices.length === 0 || choices.some((choice) => choice.reason === null)) {
      throw new BadReply("the server ended the stream without a finish reason");
    }
    this.done = true;
  }
}

import assert from "node:assert/strict";
import test from "node:test";
import { EventParser } from "../../../moesaic/serve/web/client/events.js";
import { BadReply, MoesaicError } from "../../../moesaic/serve/web/client/index.js";
import { responseError, parseRetryAfter } from "../../../moesaic/serve/web/client/responses.js";
import { Attempts, isTransient } from "../../../moesaic/serve/web/client/retry.js";

const SOURCE =
  ': hi\r\n\r\ndata: {"a": 1}\n\nevent: x\ndata:two\ndata: lines\n\n:\n\nid: 3\r\rdata\n\ndata:  spaced\r\n\r\ndatabase: no\n\ndata: ü🐇\n\ndata: cut';
const EVENTS = ['{"a": 1}', "two\nlines", "", " spaced", "ü🐇"];

test("events are complete wherever the chunks are cut", () => {
  const bytes = new TextEncoder().encode(SOURCE);
  for (let size = 1; size <= bytes.length; size += 1) {
    const parser = new EventParser();
    const events = [];
    for (let start = 0; start < bytes.length; start += size) events.push(...parser.feed(bytes.slice(start, start + size)));
    assert.deepEqual(events, EVENTS, `chunks of ${size} bytes`);
  }
  assert.throws(() => new EventParser().feed(new TextEncoder().encode("x".repeat(17 << 20))), BadReply);
  assert.throws(() => new EventParser().feed(Uint8Array.of(0xff, 10, 10)), BadReply);
});

test("errors keep the status of the response", () => {
  for (let status = 400; status < 600; status += 1) {
    for (const body of ["", "[]", "null", '{"error": "no"}', '{"error": {"message": "no", "param": null}}']) {
      const error = responseError(status, new Headers({ "retry-after": "2" }), body);
      assert.ok(error instanceof MoesaicError && error.message);
      assert.deepEqual([error.status, error.retryAfter, error.requestId], [status, 2, null]);
    }
  }
  assert.equal(parseRetryAfter("soon"), null);
  const inAMinute = parseRetryAfter(new Date(Date.now() + 60_000).toUTCString());
  assert.ok(inAMinute > 50 && inAMinute <= 60);
});

test("waits grow up to a limit and then end", () => {
  const error = Object.assign(new MoesaicError("no"), { status: 503 });
  let now = 0;
  const attempts = new Attempts({ tries: 10, seconds: 1e9, first: 0.5, longest: 8 }, () => now, () => 0.5);
  for (let failures = 0; failures < 9; failures += 1) {
    const wait = attempts.waitAfter(error);
    assert.equal(wait, 0.5 * Math.min(8, 0.5 * 2 ** failures));
    now += wait;
  }
  assert.throws(() => attempts.waitAfter(error), error);
  const impatient = new Attempts({ tries: 9, seconds: 10, first: 0, longest: 0 }, () => 0);
  assert.equal(impatient.waitAfter(Object.assign(error, { retryAfter: 9 })), 9);
  assert.throws(() => impatient.waitAfter(Object.assign(error, { retryAfter: 11 })), error);
  assert.ok(isTransient({ status: 500, retryAfter: 0 }) && !isTransient({ status: 500, retryAfter: null }));
});

test("a stream that the server accepted has its own number of tries", () => {
  const error = Object.assign(new MoesaicError("no"), { status: 503 });
  const attempts = new Attempts({ tries: 1, resumes: 3, seconds: 1e9, first: 0, longest: 0 }, () => 0);
  attempts.accepted();
  for (let failures = 0; failures < 2; failures += 1) assert.equal(attempts.waitAfter(error), 0);
  assert.throws(() => attempts.waitAfter(error), error);
});

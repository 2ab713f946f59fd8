import assert from "node:assert/strict";
import test from "node:test";
import { EventParser } from "../../../moesaic/serve/web/client/events.js";
import { BadReply, MoesaicError } from "../../../moesaic/serve/web/client/index.js";
import { responseError, parseRetryAfter } from "../../../moesaic/serve/web/client/responses.js";
import { Attempts, isTransient } from "../../../moesaic/serve/web/client/retry.js";

const SOURCE = ': hi\r\n\r\ndata: {"a": 1}\n\nevent: x\ndata:two\ndata: lines\n\nid: 3\r\rdata: ü🐇\n\ndata: cut';

test("events come out whole, however they are cut", () => {
  const bytes = new TextEncoder().encode(SOURCE);
  for (let size = 1; size <= bytes.length; size += 1) {
    const events = new EventParser();
    const found = [];
    for (let at = 0; at < bytes.length; at += size) found.push(...events.feed(bytes.slice(at, at + size)));
    assert.deepEqual(found, ['{"a": 1}', "two\nlines", "ü🐇"]);
  }
  assert.throws(() => new EventParser().feed(new TextEncoder().encode("x".repeat(17 << 20))), BadReply);
  assert.throws(() => new EventParser().feed(Uint8Array.of(0xff, 10, 10)), BadReply);
});

test("every status is an error of its own status", () => {
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

test("waits grow within bounds and end", () => {
  const error = Object.assign(new MoesaicError("no"), { status: 503 });
  let now = 0;
  const attempts = new Attempts({ tries: 10, seconds: 1e9, first: 0.5, longest: 8 }, () => now, () => 0.5);
  for (let place = 0; place < 9; place += 1) {
    const wait = attempts.waitAfter(error);
    assert.equal(wait, 0.5 * Math.min(8, 0.5 * 2 ** place));
    now += wait;
  }
  assert.throws(() => attempts.waitAfter(error), error);
  const impatient = new Attempts({ tries: 9, seconds: 10, first: 0, longest: 0 }, () => 0);
  assert.equal(impatient.waitAfter(Object.assign(error, { retryAfter: 9 })), 9);
  assert.throws(() => impatient.waitAfter(Object.assign(error, { retryAfter: 11 })), error);
  assert.ok(isTransient({ status: 500, retryAfter: 0 }) && !isTransient({ status: 500, retryAfter: null }));
});

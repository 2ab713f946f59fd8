import assert from "node:assert/strict";
import test from "node:test";
import { ApiError, readPiece } from "../../../../moesaic/serve/web/api.js";
import { EventParser } from "../../../../moesaic/serve/web/sse.js";

const SOURCE =
  ': hello\r\n\r\ndata: {"a": 1}\n\nevent: x\ndata:two\ndata: lines\n\n:\n\nid: 3\r\rdata\n\ndata:  spaced\r\n\r\ndatabase: no\n\ndata: ü🐇\n\ndata: cut';
const EVENTS = ['{"a": 1}', "two\nlines", "", " spaced", "ü🐇"];

test("events come out whole, however the stream is cut", () => {
  for (let size = 1; size <= SOURCE.length; size += 1) {
    const parser = new EventParser();
    const found = [];
    for (let start = 0; start < SOURCE.length; start += size) found.push(...parser.push(SOURCE.slice(start, start + size)));
    assert.deepEqual(found, EVENTS, `pieces of ${size}`);
  }
});

test("pieces of an answer", () => {
  const none = { text: "", finish: null, usage: null };
  const usage = { prompt_tokens: 3, completion_tokens: 4 };
  assert.deepEqual(readPiece('{"choices": [{"delta": {"content": "a"}}]}'), { ...none, text: "a" });
  assert.deepEqual(readPiece('{"choices": [{"delta": {}, "finish_reason": "stop"}]}'), { ...none, finish: "stop" });
  assert.deepEqual(readPiece(JSON.stringify({ choices: [], usage })), { ...none, usage });
  for (const odd of ["null", "1", "[]", "{}", '{"choices": 3}', '{"choices": [null]}', '{"usage": {"prompt_tokens": "3"}}']) {
    assert.deepEqual(readPiece(odd), none, odd);
  }
  assert.throws(() => readPiece('{"error": {"message": "gone"}}'), new ApiError("gone", 500));
  assert.throws(() => readPiece('{"error": {"message": "stopping", "code": 503}}'), new ApiError("stopping", 503));
  assert.throws(() => readPiece("{"), ApiError);
});

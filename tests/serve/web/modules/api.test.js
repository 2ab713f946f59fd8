import assert from "node:assert/strict";
import test from "node:test";
import { describe } from "../../../../moesaic/serve/web/api.js";
import * as errors from "../../../../moesaic/serve/web/client/index.js";

test("errors have a message for the reader", () => {
  const full = Object.assign(new errors.Overloaded("the queue is full"), { retryAfter: 6.2 });
  const cases = [
    [new errors.ConnectionFailed("http://x: Failed to fetch"), "The server cannot be reached."],
    [new errors.AnswerChanged("x"), "The connection broke before the answer was complete."],
    [new errors.BadReply("x"), "The server's response is invalid."],
    [full, "the queue is full. Try again in 7 s."],
    [new errors.Unauthorized("An API key is needed."), "An API key is needed."],
    [new Error("empty"), "empty"],
  ];
  for (const [error, message] of cases) assert.equal(describe(error), message);
});

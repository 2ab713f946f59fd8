/** Matches the runs of `*`, `_` and `~~` in a paragraph to emphasis spans (CommonMark's delimiter stack). */

/**
 * @typedef {import("./inline.js").Span} Span
 * @typedef {{char: string, count: number, opens: boolean, closes: boolean}} Run a run of `*`, `_` or `~`, and whether it
 *   may open or close a span
 */

const MAX_NESTING = 16;

/**
 * Returns the nodes with matching runs replaced by spans, and all other runs by text.
 * @param {(Span | Run)[]} nodes
 * @returns {Span[]}
 */
export function emphasize(nodes) {
  /** @type {{run: Run, spans: Span[]}[]} open runs, each with the spans after it */
  const stack = [];
  /** @type {Span[]} */
  const root = [];
  const top = () => stack.at(-1)?.spans ?? root;
  for (const node of nodes) {
    if (!("char" in node)) {
      top().push(node);
      continue;
    }
    if (node.closes) closeRun(node, stack, root);
    if (node.count > 0 && node.opens && stack.length < MAX_NESTING) stack.push({ run: node, spans: [] });
    else if (node.count > 0) top().push({ type: "text", text: node.char.repeat(node.count) });
  }
  while (stack.length > 0) unopen(stack, root);
  return join(root);
}

/**
 * Matches a closing run to open runs until its characters are used up.
 * @param {Run} run
 * @param {{run: Run, spans: Span[]}[]} stack
 * @param {Span[]} root
 */
function closeRun(run, stack, root) {
  while (run.count > 0) {
    const index = stack.findLastIndex((entry) => entry.run.char === run.char);
    if (index < 0) return;
    while (stack.length > index + 1) unopen(stack, root);
    const opener = /** @type {{run: Run, spans: Span[]}} */ (stack.at(-1));
    const used = opener.run.count >= 2 && run.count >= 2 ? 2 : 1;
    const type = run.char === "~" ? "strike" : used === 2 ? "strong" : "emphasis";
    opener.spans = [{ type, children: join(opener.spans) }];
    opener.run.count -= run.char === "~" ? 2 : used;
    run.count -= run.char === "~" ? 2 : used;
    if (opener.run.count <= 0) unopen(stack, root);
  }
}

/**
 * Removes the last open run from the stack; its remaining characters become text.
 * @param {{run: Run, spans: Span[]}[]} stack
 * @param {Span[]} root
 */
function unopen(stack, root) {
  const entry = stack.pop();
  if (!entry) return;
  const below = stack.at(-1)?.spans ?? root;
  if (entry.run.count > 0) below.push({ type: "text", text: entry.run.char.repeat(entry.run.count) });
  for (const span of entry.spans) below.push(span);
}

/**
 * Joins adjacent text spans.
 * @param {Span[]} spans
 * @returns {Span[]}
 */
function join(spans) {
  /** @type {Span[]} */
  const joined = [];
  for (const span of spans) {
    const last = joined.at(-1);
    if (span.type === "text" && last?.type === "text") last.text += span.text;
    else joined.push(span.type === "text" ? { ...span } : span);
  }
  return joined;
}

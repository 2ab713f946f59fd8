/**
 * Copies the client's source into src/ while npm packs it, and removes the copy afterwards. The source is
 * moesaic/serve/web/client, where the web chat uses it, so that only one copy is in git.
 */

import { cpSync, rmSync } from "node:fs";

const source = new URL("../../moesaic/serve/web/client/", import.meta.url);
const target = new URL("src/", import.meta.url);

rmSync(target, { recursive: true, force: true });
if (process.argv[2] === "copy") cpSync(source, target, { recursive: true });

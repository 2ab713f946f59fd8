/** Requests to the admin routes of a gateway, or of a server that loads models itself. This module does not know the page. */

import { send } from "./api.js";

/**
 * @typedef {{name: string, models: string[], slots: number, jobs: string[], about: Record<string, unknown>,
 *   since: number, heard: number, drained: boolean, quarantined: boolean}} Worker
 * @typedef {{model: string, workers: number, slots: number, queued: number, leased: number, suspects: number,
 *   cost: number}} Queue
 * @typedef {{id: string, model: string, kind: string, key: string, cost: number, worker: string, attempts: number,
 *   crashes: number, events: number}} Job
 * @typedef {{state: string, running: number, workers: number, slots: number, queued: number, leased: number,
 *   suspects: number, seconds: number, lost: number, fenced: number, dead: number}} Status
 * @typedef {{status: Status, workers: Worker[], drained: string[], banned: string[], queues: Queue[],
 *   dead: Job[]}} Gateway
 * @typedef {{name: string, aliases: string[], state: string, pinned: boolean, bytes: number | null, reserved: number,
 *   running: number, waiting: number, idle: number | null, loads: number, load_seconds: number | null,
 *   failures: number, error: string, presets: string[]}} ServedModel
 * @typedef {{models: ServedModel[], memory: number | null}} ModelServer
 */

/**
 * Returns the models of a server. A gateway has no such route.
 * @param {string} key
 * @returns {Promise<ModelServer>}
 */
export const fetchModels = (key) => send("GET", "admin/models", key);

/**
 * @param {"load" | "unload" | "unload?force=true"} action
 * @param {string} name the model's
 * @param {string} key
 */
export const controlModel = (action, name, key) => send("POST", `admin/models/${encodeURIComponent(name)}/${action}`, key);

/**
 * Returns everything that the page shows.
 * @param {string} key
 * @returns {Promise<Gateway>}
 */
export async function fetchGateway(key) {
  const status = await send("GET", "admin/status", key); // first and alone, so that a wrong key counts as one failure
  const [roster, { queues }, { jobs: dead }] = await Promise.all(
    ["admin/workers", "admin/queues", "admin/jobs?state=dead"].map((path) => send("GET", path, key)),
  );
  const { workers, drained, banned } = roster;
  return { status, workers, drained, banned, queues, dead };
}

/**
 * @param {"drain" | "resume"} action
 * @param {string} key
 */
export const controlGateway = (action, key) => send("POST", `admin/${action}`, key);

/**
 * @param {"drain" | "resume" | "ban"} action
 * @param {string} name the worker's
 * @param {string} key
 */
export const controlWorker = (action, name, key) => send("POST", `admin/workers/${action}`, key, { body: { name } });

/** @param {string} id of a dead job @param {string} key */
export const reviveJob = (id, key) => send("POST", `admin/jobs/${encodeURIComponent(id)}/revive`, key);

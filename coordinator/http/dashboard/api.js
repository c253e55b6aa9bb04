// Reads of the coordinator's API, and the few writes that need the operator's token.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function answer(response) {
  const body = await response.json().catch(() => ({}));
  if (!response.ok) throw new ApiError(response.status, body.error ?? `the coordinator answered with status ${response.status}`);
  return body;
}

export const read = async (path) => answer(await fetch(`/api/v1/${path}`));

export const write = async (path, token, body) =>
  answer(await fetch(`/api/v1/${path}`, {
    method: "POST",
    headers: { Authorization: `Bearer ${token}`, ...(body && { "Content-Type": "application/json" }) },
    body: body && JSON.stringify(body),
  }));

export const jobPath = (id, part = "") => `jobs/${encodeURIComponent(id)}${part && `/${part}`}`;
